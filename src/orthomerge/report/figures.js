// Figures: one shown at a time in each place, repainted when the theme changes.
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const boxes = [...document.querySelectorAll("[data-figure]")];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faint = (colour) => colour + "24";

  const paint = (figure, dark) => {
    const theme = dark ? "dark" : "light", palette = data.palette[theme];
    const ink = css("--ink"), quietInk = css("--quiet"), grid = css("--grid");
    for (const trace of figure.data) {
      if (trace.meta.shades) {
        trace.colorscale = trace.meta.shades[theme];
        trace.colorbar.tickfont = trace.colorbar.title.font = { color: ink };
        continue;
      }
      const slot = trace.meta.slot;
      const colour = slot < 0 ? quietInk : palette[slot % palette.length];
      if (trace.meta.band) trace.fillcolor = faint(colour);
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
  // A title on as many lines as its axis is wide.
  const folded = (text, most) =>
    text.split(" ").reduce((lines, word) => {
      const last = lines.at(-1);
      if (last !== undefined && last.length + word.length < most) return [...lines.slice(0, -1), `${last} ${word}`];
      return [...lines, word];
    }, []).join("<br>");
  // What names of categories take below the axis once they are too long to lie level.
  const tilted = (layout, width, sign) => {
    const names = layout.xaxis.categoryarray ?? [];
    const longest = Math.max(0, ...names.map((name) => name.length)) * sign;
    return longest > (width - 70) / Math.max(names.length, 1) ? 0.6 * longest : 0;
  };
  // A figure and its heading share a sheet.
  const most = () => (root.classList.contains("paper") ? 540 : Infinity);
  const fit = (figure, width) => {
    const layout = figure.layout, small = width < 640;
    layout.font.size = small ? 11 : 13;
    layout.dragmode = small ? false : "zoom";
    if (figure.data[0].type === "heatmap") {
      const tasks = figure.data[0].x.length;
      layout.width = Math.min(width, 260 + 74 * tasks);
      layout.height = Math.min(layout.width, 170 + 46 * tasks, most());
      layout.margin = { l: 10, r: 10, t: 34, b: 10 };
      return;
    }
    const sign = small ? 6.2 : 7.4;
    const titles = Object.keys(layout).filter((key) => /^xaxis/.test(key) && layout[key].title?.text);
    for (const key of titles) {
      const title = layout[key].title, share = layout[key].domain ?? [0, 1];
      title.whole ??= title.text;
      title.text = folded(title.whole, ((share[1] - share[0]) * (width - 70)) / (sign + 1.4));
    }
    const folds = Math.max(0, ...titles.map((key) => layout[key].title.text.split("<br>").length - 1));
    const names = figure.data.filter((t) => t.showlegend !== false).map((t) => t.name.length);
    const entry = small ? 42 + 6 * Math.max(6, ...names) : 48 + 7 * Math.max(6, ...names);
    const lines = Math.ceil(names.length / Math.max(1, Math.floor((width - 40) / entry)));
    const below = (layout.xaxis.title ? 62 : layout.xaxis2 ? 58 : 36) + 18 * folds + tilted(layout, width, sign);
    const plot = Math.min((small ? 300 : 380) + (layout.yaxis2 ? 100 : 0), most() - 34 - below - 20 * lines);
    layout.margin = { l: small ? 44 : 58, r: 10, t: 34, b: below + 20 * lines };
    layout.height = plot + layout.margin.t + layout.margin.b;
    layout.legend = { ...layout.legend, y: -below / plot, yanchor: "top", font: { size: small ? 11 : 12.5 }, tracegroupgap: 0 };
  };

  // Places with a choice: which figure is shown, and where its slider stands.
  const chosen = {};
  const stepsOf = (figure) => figure.steps ?? [];
  for (const group of Object.values(data.figures)) {
    for (const figure of group) {
      figure.steps = (figure.layout.sliders ?? []).flatMap((s) => s.steps);
      delete figure.layout.sliders;
    }
  }
  const figureOf = (place) => {
    const { which, step } = (chosen[place] ??= { which: 0, step: 0 });
    const figure = data.figures[place][which];
    const change = stepsOf(figure)[step]?.args[0] ?? {};
    figure.data.forEach((trace, i) => {
      for (const [key, values] of Object.entries(change)) trace[key] = values[i];
    });
    return figure;
  };
  const icons = window.Plotly?.Icons;
  const drawOne = (box) => {
    const figure = figureOf(box.dataset.figure);
    const name = `${data.name}-${figure.layout.meta.name}`;
    const save = (format) => (gd) =>
      Plotly.downloadImage(gd, { format, scale: format === "png" ? 2 : 1, filename: name, width: gd.clientWidth, height: gd.clientHeight });
    paint(figure, isDark());
    fit(figure, box.clientWidth);
    box.style.minHeight = `${figure.layout.height}px`;
    box.setAttribute("aria-label", figure.layout.meta.alt);
    return Plotly.react(box, figure.data, { ...figure.layout, datarevision: Math.random() }, {
      responsive: true,
      displaylogo: false,
      displayModeBar: true,
      modeBarButtons: [[
        { name: "Download as PNG", icon: icons.camera, click: save("png") },
        { name: "Download as SVG", icon: icons.disk, click: save("svg") },
        "resetScale2d",
      ]],
    });
  };
  const draw = () => {
    if (window.Plotly) for (const box of boxes) drawOne(box);
  };
  for (const controls of document.querySelectorAll("[data-controls]")) {
    const place = controls.dataset.controls;
    const box = boxes.find((b) => b.dataset.figure === place);
    const select = controls.querySelector("select"), range = controls.querySelector("input");
    const moved = () => {
      const which = Number(select?.value ?? 0);
      const steps = stepsOf(data.figures[place][which]);
      let step = 0;
      if (range) {
        range.max = Math.max(steps.length - 1, 0);
        step = Number(range.value);
        const label = steps[step]?.label ?? "";
        range.setAttribute("aria-valuetext", label);
        controls.querySelector("output").textContent = label;
      }
      chosen[place] = { which, step };
      if (window.Plotly) drawOne(box);
    };
    select?.addEventListener("change", moved);
    range?.addEventListener("input", moved);
  }
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
  // print.js has laid the page out for the sheet by then.
  addEventListener("beforeprint", draw);
  addEventListener("afterprint", draw);
})();
