"""The script of the explorer: what each model says of the sample that is picked, at the T of the slider."""

from __future__ import annotations

EXPLORE = """
"use strict";
(() => {
  const all = JSON.parse(document.getElementById("samples").textContent);
  const ROWS = 10;

  function softened(logits, t) {
    const top = Math.max(...logits), raised = logits.map((z) => Math.exp((z - top) / t));
    const sum = raised.reduce((a, b) => a + b, 0);
    return raised.map((v) => v / sum);
  }
  const entropy = (p) => -p.reduce((sum, v) => sum + (v > 0 ? v * Math.log(v) : 0), 0);
  const away = (p, q) => p.reduce((sum, v, i) => sum + (v > 0 ? v * Math.log(v / Math.max(q[i], 1e-300)) : 0), 0);
  const best = (logits) => logits.indexOf(Math.max(...logits));
  const percent = (v) => `${(100 * v).toFixed(1)}\\u00a0%`;

  function made(tag, text, kind) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  }
  function named(text, role) {
    const whole = made("span", undefined, "role");
    whole.append(made("span", undefined, `swatch ${role}`), text);
    return whole;
  }

  for (const form of document.querySelectorAll("form.explorer")) {
    const found = all[Number(form.dataset.explorer)];
    const slider = form.querySelector("input[type=range]"), out = form.querySelector("output");
    const low = Number(slider.dataset.low), high = Number(slider.dataset.high);
    const placed = (t) => Math.round(slider.max * Math.log(t / low) / Math.log(high / low));
    let t = Number(slider.dataset.taught);
    slider.value = placed(t);

    // Classes in the order of the first model, which T does not change; those that another finds likeliest, and the
    // label, are always among them.
    function classes(one) {
      const order = one.logits[0].map((z, i) => [z, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).map((x) => x[1]);
      const wanted = new Set([...order.slice(0, ROWS), ...one.logits.map(best)]);
      if (one.label !== null) wanted.add(one.label);
      return order.filter((i) => wanted.has(i));
    }

    function row(name, shares) {
      const line = made("tr"), head = made("th");
      head.scope = "row";
      head.append(name);
      line.append(head);
      shares.forEach((share, i) => {
        const cell = made("td"), bar = made("span", undefined, `bar ${found.models[i]}`);
        bar.style.width = `${(100 * share).toFixed(2)}%`;
        const track = made("span", undefined, "track");
        track.append(bar);
        cell.append(track, made("span", percent(share), "share"));
        line.append(cell);
      });
      return line;
    }

    function soften() {
      const number = Number(new FormData(form).get(`sample${form.dataset.explorer}`) || 0);
      const one = found.samples[number], p = one.logits.map((logits) => softened(logits, t));
      const shown = classes(one), left = found.names.length - shown.length;
      const lines = shown.map((i) => {
        const name = made("span", found.names[i]);
        if (i === one.label) name.append(" ", made("small", "label", "right"));
        return row(name, p.map((q) => q[i]));
      });
      if (left > 0) {
        const rest = p.map((q) => Math.max(0, 1 - shown.reduce((sum, i) => sum + q[i], 0)));
        lines.push(row(made("span", `${left} others`), rest));
      }
      form.querySelector("tbody").replaceChildren(...lines);
      const said = `T = ${Number(t.toPrecision(3))}`;
      out.textContent = said;
      slider.setAttribute("aria-valuetext", said);
      const mean = found.models.indexOf(found.reference), mine = found.models.indexOf(found.student);
      const spread = found.called.map((name, i) => `${name} ${entropy(p[i]).toFixed(3)}`).join(", ");
      const most = Math.log(found.names.length).toFixed(3);
      form.querySelector(".entropy").textContent = `Entropy, nats (at most ${most}): ${spread}.`
        + ` KL of the ${found.called[mine]} from the ${found.called[mean]} at this T: `
        + `${away(p[mean], p[mine]).toFixed(3)}.`;
    }

    function pick() {
      const card = form.querySelector(".card:has(input:checked)"), sample = form.querySelector(".sample");
      const image = card.querySelector("img"), text = card.querySelector("[data-text]");
      sample.replaceChildren();
      if (image) {
        const large = image.cloneNode();
        large.width = large.height = 140;
        sample.append(large);
      }
      if (text) sample.append(made("blockquote", text.dataset.text));
      const facts = made("p", card.querySelector("input").getAttribute("aria-label"), "note");
      sample.append(facts);
      soften();
    }

    const head = made("tr");
    head.append(made("th", "Class"), ...found.called.map((name, i) => {
      const cell = made("th");
      cell.append(named(name, found.models[i]));
      return cell;
    }));
    for (const cell of head.children) cell.scope = "col";
    form.querySelector("thead").replaceChildren(head);
    slider.addEventListener("input", () => { t = low * (high / low) ** (slider.value / slider.max); soften(); });
    for (const button of form.querySelectorAll("[data-set]")) {
      button.addEventListener("click", () => {
        t = Number(button.dataset.set);
        slider.value = placed(t);
        soften();
      });
    }
    form.querySelector(".cards").addEventListener("change", pick);
    form.addEventListener("submit", (event) => event.preventDefault());
    pick();
  }
})();
"""
