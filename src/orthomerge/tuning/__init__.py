"""Weights of a merge found on data: searched on validation rows, or by entropy; Fisher weights."""

from orthomerge.tuning.groups import depth_groups

__all__ = ["depth_groups"]
