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

  const ROLES = {
    teacher: { color: "--teacher", symbol: "diamond", dash: "dot" },
    baseline: { color: "--baseline", symbol: "square", dash: "dash" },
    distilled: { color: "--distilled", symbol: "circle", dash: "solid" },
  };
  const OTHER_ROLE = { color: "--ink", symbol: "circle", dash: "solid" };
  const HEAT_SCALE = [0, 1, 2, 3].map((i) => [i / 3, `--heat${i}`]);
  const TERM_COLOURS = 6;
  const OUTLINE = { color: "--card", width: 1 };

  // Trials of a search by their kind.
  const TRIAL_MARKERS = {
    "finished": { color: "--distilled", symbol: "circle", size: 9, opacity: 0.85 },
    "stopped early": { color: "--quiet", symbol: "x-thin-open", size: 9, line: { width: 2 } },
    "unchanged recipe": { color: "--baseline", symbol: "diamond", size: 13 },
    "chosen": { color: "--term3", symbol: "star", size: 16 },
  };
  const TRIAL_LINES = {
    "stopped early": { color: "--quiet", width: 1, dash: "dot" },
    "finished": { color: "--distilled", width: 1 },
    "chosen": { color: "--term3", width: 3 },
  };

  const BIN_HOVER = "confidence %{x:.1%}, accuracy %{y:.1%}<br>gap %{customdata[1]:.1%}, %{customdata[0]:,} samples";
  const CURVE_HOVER = "%{y:.4g} (step %{customdata})";

  // For each style a function of the role's properties and of the trace. It returns properties for plotly; properties
  // that the trace has itself take precedence.
  const STYLES = {
    "term": (_, { term }) => ({
      line: { width: 2, color: `--term${(term % TERM_COLOURS) + 1}`, dash: "solid" }, hovertemplate: CURVE_HOVER,
    }),
    "sum": () => ({ line: { width: 2, color: "--ink", dash: "dot" }, hovertemplate: CURVE_HOVER }),
    "validation": ({ color, dash }) => ({
      line: { width: 2, color, dash }, opacity: 0.85,
      hovertemplate: "%{y:.2%}, step %{customdata}<extra>%{meta}</extra>",
    }),
    "level": ({ color }, { role }) => ({
      line: { color, width: 2 }, hovertemplate: `%{y:.2%}<extra>${role}</extra>`,
    }),
    "stroke": ({ color, dash }, { role }) => ({
      line: { color, dash, width: 3 }, hovertemplate: `%{x:.2%}<extra>${role}</extra>`,
    }),
    "seeds": ({ color, symbol }, { role }) => ({
      marker: { color, symbol, size: 12, opacity: 0.9, line: OUTLINE },
      hovertemplate: `%{customdata}<br>%{x:.2%}<extra>${role}</extra>`,
    }),
    "mean": ({ color }, { role }) => ({
      marker: { color, symbol: "line-ns-open", size: 26, line: { width: 3 } },
      hovertemplate: `mean %{x:.2%}<extra>${role}</extra>`,
    }),
    "chain": () => ({ line: { color: "--rule", width: 2 }, hoverinfo: "skip" }),
    "diagonal": () => ({ line: { color: "--quiet", width: 1 }, hoverinfo: "skip", showlegend: false }),
    "bins": ({ color, symbol, dash }, { name, total, customdata }) => ({
      showlegend: true, line: { color, dash, width: 1.5 },
      marker: {
        color, symbol, opacity: 0.9, line: OUTLINE,
        size: customdata.map(([n]) => Math.round(10 * (6 + 12 * Math.sqrt(n / total))) / 10),
      },
      error_y: { type: "data", symmetric: false, width: 0, thickness: 1.5, color },
      hovertemplate: `${BIN_HOVER}<extra>${name}</extra>`,
    }),
    "small bins": ({ color, symbol }, { name }) => ({
      showlegend: false, marker: { color, symbol: `${symbol}-open`, size: 6 },
      hovertemplate: `${BIN_HOVER}<extra>${name}</extra>`,
    }),
    "bars": ({ color }, { name }) => ({
      orientation: "h", marker: { color }, textposition: "outside", cliponaxis: false, textfont: { size: 10 },
      hovertemplate: `%{customdata}: %{x:.2%}<extra>${name}</extra>`,
    }),
    "importance": () => ({
      orientation: "h", marker: { color: "--distilled" }, textposition: "auto",
      hovertemplate: "%{x:.0%}<extra></extra>",
    }),
    "trials": (_, { name }) => ({
      marker: TRIAL_MARKERS[name],
      hovertemplate: `%{customdata[0]}<br>%{customdata[1]:.2%}<extra>${name}</extra>`,
    }),
    "evaluations": (_, { name }) => ({
      line: TRIAL_LINES[name], opacity: name === "chosen" ? 1 : 0.7,
      hovertemplate: `%{customdata}, evaluation %{x}<br>%{y:.2%}<extra>${name}</extra>`,
    }),
    "best so far": () => ({ line: { color: "--distilled", width: 2, shape: "hv" }, hoverinfo: "skip" }),
    "two keys": () => ({
      marker: {
        colorscale: HEAT_SCALE, size: 14, line: { color: "--quiet", width: 1 },
        colorbar: { thickness: 12, outlinewidth: 0, nticks: 5 },
      },
      hovertemplate: "%{customdata[0]}: %{x:.4g}, %{y:.4g}<br>%{customdata[1]:.2%}<extra></extra>",
    }),
    "ring": () => ({
      marker: { color: "--term3", symbol: "circle-open", size: 22, line: { width: 3 } }, hoverinfo: "skip",
    }),
    "heatmap": (_, { name, show }) => ({
      hoverongaps: false, colorscale: HEAT_SCALE, textfont: { size: 9 },
      colorbar: {
        orientation: "h", y: 1.01, yanchor: "bottom", thickness: 8, len: 1, lenmode: "fraction", xpad: 0, ypad: 4,
        outlinewidth: 0, nticks: 5, ticksuffix: " %", tickfont: { size: 10 }, ticklabelposition: "outside top",
      },
      hovertemplate: `%{y} and %{x}: %{z:.2f} %<extra>${name}, T = ${show.T}</extra>`,
    }),
  };

  const HEAT_AXIS = {
    type: "category", tickmode: "array", tickfont: { size: 11 }, showgrid: false, zeroline: false, ticks: "",
    constrain: "domain",
  };

  // The properties of a layout by its style.
  const LAYOUTS = {
    "rows": { showlegend: false, margin: { l: 48, r: 16, t: 8, b: 50 }, xaxis: { tickangle: 0 } },
    "bars": {
      barmode: "group", bargap: 0.22, showlegend: false,
      xaxis: { range: [0, 1.12], tickvals: [0, 0.5, 1], tickangle: 0, tickformat: ".0%", side: "bottom" },
      yaxis: { automargin: false },
    },
    "heatmap": {
      margin: { l: 24, r: 6, t: 32, b: 24 }, plot_bgcolor: "--rule", showlegend: false,
      xaxis: HEAT_AXIS, yaxis: { ...HEAT_AXIS, autorange: "reversed" },
    },
  };

  // The properties of both objects, also of objects inside them; those of the second take precedence.
  function merge(first, second) {
    const merged = { ...first };
    for (const [key, value] of Object.entries(second)) {
      const isObject = value !== null && typeof value === "object" && !Array.isArray(value);
      merged[key] = isObject && key in merged ? merge(merged[key], value) : value;
    }
    return merged;
  }

  const AXIS = { automargin: true, gridcolor: "--rule", linecolor: "--rule", zerolinecolor: "--rule" };
  const AXIS_TITLE = { standoff: 10, font: { size: 13, color: "--quiet" } };

  function axis(options) {
    return merge({ ...AXIS, title: AXIS_TITLE }, options);
  }

  // A trace's "show" says for which values of the controls it is drawn. Its "by" holds properties by control and value.
  function traces(figure, choice) {
    return figure.data
      .filter((trace) => Object.entries(trace.show || {}).every(([name, value]) => choice[name] === value))
      .map((trace) => {
        const { style, role, show, by, term, total, ...own } = trace;
        const styled = style ? merge(STYLES[style](ROLES[role] || OTHER_ROLE, trace), own) : own;
        return Object.assign(styled, ...Object.entries(by || {}).map(([name, choices]) => choices[choice[name]]));
      });
  }

  function draw(plot, paperWidth) {
    const figure = figures[Number(plot.dataset.figure)];
    const form = plot.closest("figure").querySelector("form");
    const choice = form ? Object.fromEntries(new FormData(form)) : {};
    const width = paperWidth || plot.clientWidth;
    const height = figure.square ? Math.min(Math.max(width, 340), 560) : figure.layout.height;
    plot.style.height = `${height}px`;
    const { style, ...own } = figure.layout;
    const styled = merge({ plot_bgcolor: "rgba(0,0,0,0)", ...LAYOUTS[style] }, own);
    const layout = {
      margin: { l: 48, r: 16, t: 40, b: 50 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...(figure.square ? { itemsizing: "constant" } : {}) },
      ...styled,
      height,
      xaxis: axis(styled.xaxis),
      yaxis: axis(styled.yaxis),
      paper_bgcolor: "rgba(0,0,0,0)",
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
      displayModeBar: touch.matches || width < 480 || layout.showlegend === false ? false : "hover",
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
