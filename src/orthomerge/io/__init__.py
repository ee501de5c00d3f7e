"""Files: whole-or-nothing writes, bounded reading, safetensors, result rows."""
