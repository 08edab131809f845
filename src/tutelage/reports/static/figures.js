// Draws the figures in the colours of the page, and again when a control, the colour scheme or the medium changes.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-figure]")];
  const root = document.documentElement;
  const touch = matchMedia("(max-width: 640px), (pointer: coarse)");
  const PAPER_WIDTH = 640;

  // Replaces the names of CSS variables by their values, under keys that end in "color" or "colorscale".
  function resolveColours(value, key, css) {
    if (Array.isArray(value)) return value.map((v) => resolveColours(v, key, css));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolveColours(v, k, css)]));
    }
    const isVariable = typeof value === "string" && value.startsWith("--") && /color(scale)?$/.test(key);
    return isVariable ? css.getPropertyValue(value).trim() : value;
  }

  function axis(options) {
    const title = { standoff: 10, ...options.title, font: { size: 13, color: "--quiet" } };
    return { gridcolor: "--rule", linecolor: "--rule", zerolinecolor: "--rule", ...options, title };
  }

  // A trace's "show" says for which values of the controls it is drawn. Its "by" holds properties by control and value.
  function traces(figure, choice) {
    return figure.data
      .filter((trace) => Object.entries(trace.show || {}).every(([name, value]) => choice[name] === value))
      .map(({ show, by, ...trace }) =>
        Object.assign(trace, ...Object.entries(by || {}).map(([name, choices]) => choices[choice[name]])));
  }

  function draw(plot, paperWidth) {
    const figure = figures[Number(plot.dataset.figure)];
    const form = plot.closest("figure").querySelector("form");
    const choice = form ? Object.fromEntries(new FormData(form)) : {};
    const width = paperWidth || plot.clientWidth;
    const height = figure.square ? Math.min(Math.max(width, 340), 560) : figure.layout.height;
    plot.style.height = `${height}px`;
    const layout = {
      ...figure.layout,
      height,
      xaxis: axis(figure.layout.xaxis),
      yaxis: axis(figure.layout.yaxis),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: figure.layout.plot_bgcolor || "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "--ink" },
      hoverlabel: {
        bgcolor: "--card",
        bordercolor: "--quiet",
        font: { color: "--ink" },
        align: "left",
        namelength: -1,
      },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "--quiet", activecolor: "--ink" },
      dragmode: touch.matches ? false : "zoom",
      uirevision: JSON.stringify(choice),
      autosize: !paperWidth,
      ...(paperWidth ? { width: paperWidth } : {}),
    };
    const config = {
      displaylogo: false,
      displayModeBar: touch.matches || width < 480 || figure.layout.showlegend === false ? false : "hover",
      modeBarButtons: [["toImage", "resetScale2d"]],
      responsive: true,
    };
    const css = getComputedStyle(root);
    return Plotly.react(
      plot, resolveColours(traces(figure, choice), "", css), resolveColours(layout, "", css), config,
    );
  }

  const widthOf = (plot, paperWidth) => paperWidth && Number(plot.dataset.paper || paperWidth);
  const drawAll = (paperWidth) => Promise.all(plots.map((plot) => draw(plot, widthOf(plot, paperWidth))));

  for (const form of document.querySelectorAll("form.controls")) {
    const place = form.closest("figure");
    form.addEventListener("change", () => {
      const choice = new FormData(form);
      for (const part of place.querySelectorAll("[data-when]")) {
        const [name, value] = part.dataset.when.split("=");
        part.hidden = choice.get(name) !== value;
      }
      place.querySelectorAll("[data-figure]").forEach((plot) => draw(plot));
    });
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  touch.addEventListener("change", () => drawAll());
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    drawAll(PAPER_WIDTH);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    drawAll();
  });
  drawAll().then(() => root.classList.add("drawn"));
})();
