"""The page's script: draws the figures in the scheme's colours, and again when a choice or the scheme changes."""

from __future__ import annotations

SCRIPT = """
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll("[data-figure]")];
  const root = document.documentElement;
  const touch = matchMedia("(max-width: 640px), (pointer: coarse)");
  const PAPER = 640;

  // Values under a key that ends in "color" or "colorscale" and name a CSS variable become that variable's value.
  function painted(value, key, css) {
    if (Array.isArray(value)) return value.map((v) => painted(v, key, css));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k, css)]));
    }
    const names = typeof value === "string" && value.startsWith("--") && /color(scale)?$/.test(key);
    return names ? css.getPropertyValue(value).trim() : value;
  }

  function axis(given) {
    const title = { standoff: 10, ...given.title, font: { size: 13, color: "--quiet" } };
    return { gridcolor: "--rule", linecolor: "--rule", zerolinecolor: "--rule", ...given, title };
  }

  function draw(plot, width) {
    const figure = figures[Number(plot.dataset.figure)];
    const form = plot.closest("figure").querySelector("form");
    const choice = form ? Object.fromEntries(new FormData(form)) : {};
    const data = figure.data
      .filter((trace) => Object.entries(trace.show || {}).every(([name, value]) => choice[name] === value))
      .map(({ show, by, ...trace }) =>
        Object.assign(trace, ...Object.entries(by || {}).map(([name, choices]) => choices[choice[name]])));
    const wide = width || plot.clientWidth;
    const height = figure.square ? Math.min(Math.max(wide, 340), 560) : figure.layout.height;
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
        bgcolor: "--card", bordercolor: "--quiet", font: { color: "--ink" }, align: "left", namelength: -1,
      },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "--quiet", activecolor: "--ink" },
      dragmode: touch.matches ? false : "zoom",
      uirevision: JSON.stringify(choice),
      autosize: !width,
      ...(width ? { width } : {}),
    };
    const config = {
      displaylogo: false,
      displayModeBar: touch.matches || wide < 480 || figure.layout.showlegend === false ? false : "hover",
      modeBarButtons: [["toImage", "resetScale2d"]],
      responsive: true,
    };
    const css = getComputedStyle(root);
    return Plotly.react(plot, painted(data, "", css), painted(layout, "", css), config);
  }

  const widthOf = (plot, width) => width && Number(plot.dataset.paper || width);
  const drawAll = (width) => Promise.all(plots.map((plot) => draw(plot, widthOf(plot, width))));

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
  addEventListener("beforeprint", () => { root.classList.add("paper"); drawAll(PAPER); });
  addEventListener("afterprint", () => { root.classList.remove("paper"); drawAll(); });
  drawAll().then(() => root.classList.add("drawn"));
})();
"""
