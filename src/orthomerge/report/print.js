// Printing: everything open, in light colours, nothing wider than the sheet.
(() => {
  const root = document.documentElement;
  // On paper nothing scrolls: a table wider than the sheet becomes several, each with the first column.
  const spansOf = (row, first) => {
    let at = first;
    return [...row.cells].map((cell) => {
      const span = { cell, from: at, to: at + cell.colSpan };
      at = span.to;
      return span;
    });
  };
  const gridOf = (table) => {
    let taken = 0;
    return [...table.rows].map((row) => {
      const spans = spansOf(row, taken);
      taken = row.cells[0].rowSpan > 1 ? 1 : 0;
      return { row, spans };
    });
  };
  const chunksOf = (grid, table, room) => {
    const whole = piecesOf(grid, table, room);
    for (let less = room - 20; ; less -= 20) {
      const even = piecesOf(grid, table, less);
      if (even.length > whole.length || less < room / 3) return piecesOf(grid, table, less + 20);
    }
  };
  const piecesOf = (grid, table, room) => {
    const widths = grid.find(({ row }) => row.parentElement.tagName === "TBODY").spans.map(({ cell }) => cell.offsetWidth);
    const starts = new Set(table.tHead.rows.length > 1 ? grid[0].spans.map(({ from }) => from) : widths.keys());
    const chunks = [];
    for (let from = 1; from < widths.length; ) {
      let to = from + 1, used = widths[0] + widths[from];
      while (to < widths.length && used + widths[to] <= room) used += widths[to++];
      let cut = to;
      while (to < widths.length && cut > from && !starts.has(cut)) cut--;
      chunks.push([from, (from = cut > from ? cut : to)]);
    }
    return chunks;
  };
  const partOf = (table, grid, from, to) => {
    const part = table.cloneNode(false);
    part.removeAttribute("id");
    part.classList.add("part");
    if (table.caption) part.append(table.caption.cloneNode(true));
    for (const { row, spans } of grid) {
      const tag = row.parentElement.tagName.toLowerCase();
      const body = part.lastElementChild?.localName === tag ? part.lastElementChild : part.appendChild(document.createElement(tag));
      const line = body.appendChild(row.cloneNode(false));
      for (const span of spans) {
        const width = span.from === 0 ? 1 : Math.min(span.to, to) - Math.max(span.from, from);
        if (width < 1) continue;
        line.append(span.cell.cloneNode(true));
        line.lastElementChild.colSpan = width;
      }
    }
    return part;
  };
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.dataset.was = d.open ? "1" : ""; d.open = true; });
    root.dataset.was = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    root.classList.add("paper");
    const room = document.body.clientWidth;
    for (const table of document.querySelectorAll(".box > table")) {
      if (table.offsetWidth <= room || !table.tBodies[0].rows.length) continue;
      const grid = gridOf(table);
      table.after(...chunksOf(grid, table, room).map(([from, to]) => partOf(table, grid, from, to)));
      table.classList.add("split");
    }
  });
  addEventListener("afterprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.open = d.dataset.was === "1"; });
    document.querySelectorAll(".part").forEach((part) => part.remove());
    document.querySelectorAll(".split").forEach((table) => table.classList.remove("split"));
    if (root.dataset.was) root.dataset.theme = root.dataset.was; else delete root.dataset.theme;
    root.classList.remove("paper");
  });
})();
