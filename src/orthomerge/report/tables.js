"use strict";
// Tables: sorting by any heading, copying as CSV.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const said = document.getElementById("said");
  let quiet;
  const say = (text) => {
    said.textContent = text;
    said.classList.add("on");
    clearTimeout(quiet);
    quiet = setTimeout(() => said.classList.remove("on"), 1800);
  };

  const plain = (cell) => (cell.dataset.value ?? cell.textContent).trim();
  const headsOf = (table) => {
    const [top, bottom] = table.tHead.rows;
    return bottom ? [top.cells[0], ...bottom.cells] : [...top.cells];
  };

  // Sorting: largest first, then smallest first; cells without a number stay last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = headsOf(table);
    heads.forEach((head, column) => {
      head.querySelector(".sort").addEventListener("click", () => {
        const text = head.dataset.type === "text";
        const before = head.getAttribute("aria-sort");
        const up = before ? before === "descending" : text;
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const missing = (x) => x === "" || (!text && Number.isNaN(Number(x)));
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          const x = plain(a.cells[column]), y = plain(b.cells[column]);
          if (missing(x) || missing(y)) return missing(x) - missing(y);
          const order = text ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Copying: the two tables of scores in long form at full precision, any other as it stands.
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const csvOf = (table) =>
    [headsOf(table), ...[...table.tBodies[0].rows].map((row) => [...row.cells])]
      .map((cells) => cells.map((cell) => quoted(plain(cell))).join(",") + "\n")
      .join("");
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const what = button.dataset.copy;
      const text = data.csv[what] ?? csvOf(document.getElementById(what));
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        const area = document.createElement("textarea");
        area.value = text;
        document.body.append(area);
        area.select();
        const done = document.execCommand("copy");
        area.remove();
        if (!done) return say("The browser does not allow copying");
      }
      say("Copied");
    });
  }

  // The second line of the headline's cells can be put away.
  const kept = document.getElementById("kept");
  kept.addEventListener("change", () => {
    document.getElementById("headline").classList.toggle("nokept", !kept.checked);
  });
})();
