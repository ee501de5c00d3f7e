"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const said = document.getElementById("said");
  let quiet;
  const say = (text) => {
    said.textContent = text;
    said.classList.add("on");
    clearTimeout(quiet);
    quiet = setTimeout(() => said.classList.remove("on"), 1800);
  };

  // Sorting: largest first, then smallest first; cells without a number stay last.
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const [top, bottom] = table.tHead.rows;
    const heads = [top.cells[0], ...bottom.cells];
    heads.forEach((head, column) => {
      head.querySelector(".sort").addEventListener("click", () => {
        const text = head.dataset.type === "text";
        const before = head.getAttribute("aria-sort");
        const up = before ? before === "descending" : text;
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          const x = valueOf(a, column), y = valueOf(b, column);
          if (x === "" || y === "") return (x === "") - (y === "");
          const order = text ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = data.csv[button.dataset.csv];
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

  const kept = document.getElementById("kept");
  kept.addEventListener("change", () => {
    document.getElementById("headline").classList.toggle("nokept", !kept.checked);
  });

  // Figures: drawn once, repainted when the theme changes.
  const figures = [...document.querySelectorAll("[data-figure]")];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const paint = (figure, dark) => {
    const palette = data.palette[dark ? "dark" : "light"];
    const ink = css("--ink"), quietInk = css("--quiet"), grid = css("--grid");
    for (const trace of figure.data) {
      const slot = trace.meta.slot;
      const colour = slot < 0 ? quietInk : palette[slot % palette.length];
      if (trace.line) trace.line.color = colour;
      if (trace.error_y) trace.error_y.color = trace.type === "bar" ? ink : colour;
      if (trace.marker) {
        trace.marker.color = colour;
        if (trace.marker.line) trace.marker.line.color = ink;
        if (trace.marker.pattern) trace.marker.pattern.fgcolor = css("--card");
      }
    }
    const layout = figure.layout;
    layout.font.color = ink;
    layout.paper_bgcolor = css("--card");
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: quietInk, activecolor: css("--accent") };
    layout.hoverlabel = { align: "left", bgcolor: css("--card"), bordercolor: quietInk, font: { color: ink } };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis/.test(key)) layout[key].gridcolor = grid;
    }
    for (const shape of layout.shapes || []) shape.line.color = ink;
  };
  const fit = (figure, width) => {
    const layout = figure.layout;
    const names = figure.data.filter((t) => t.showlegend !== false).map((t) => t.name.length);
    const small = width < 640;
    const entry = small ? 42 + 6 * Math.max(6, ...names) : 48 + 7 * Math.max(6, ...names);
    const lines = Math.ceil(names.length / Math.max(1, Math.floor((width - 40) / entry)));
    const plot = small ? 300 : 380, below = layout.xaxis2 ? 58 : 36;
    layout.margin = { l: small ? 44 : 58, r: 10, t: 34, b: below + 20 * lines };
    layout.height = plot + layout.margin.t + layout.margin.b;
    layout.legend = { ...layout.legend, y: -below / plot, yanchor: "top", font: { size: small ? 11 : 12.5 }, tracegroupgap: 0 };
    layout.font.size = small ? 11 : 13;
    layout.dragmode = small ? false : "zoom";
  };
  const draw = (dark = isDark()) => {
    if (!window.Plotly) return;
    for (const box of figures) {
      const figure = data.figures[box.dataset.figure];
      const name = `${data.name}-${figure.layout.meta.name}`;
      paint(figure, dark);
      fit(figure, box.clientWidth);
      Plotly.react(box, figure.data, figure.layout, {
        responsive: true,
        displaylogo: false,
        displayModeBar: true,
        modeBarButtons: [[
          { name: "Download as PNG", icon: Plotly.Icons.camera, click: (gd) => Plotly.downloadImage(gd, { format: "png", scale: 2, filename: name, width: gd.clientWidth, height: gd.clientHeight }) },
          { name: "Download as SVG", icon: Plotly.Icons.disk, click: (gd) => Plotly.downloadImage(gd, { format: "svg", filename: name, width: gd.clientWidth, height: gd.clientHeight }) },
          "resetScale2d",
        ]],
      });
    }
  };
  draw();
  let width = innerWidth, later;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(later);
    later = setTimeout(draw, 150);
  });
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("orthomerge-theme", root.dataset.theme); } catch {}
    draw();
  });
  system.addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.dataset.was = d.open ? "1" : ""; d.open = true; });
    draw(false);
  });
  addEventListener("afterprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.open = d.dataset.was === "1"; });
    draw();
  });
})();
