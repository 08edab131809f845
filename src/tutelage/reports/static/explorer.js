// The sample explorer: the distribution of each model for the chosen sample, at the temperature of the slider.
"use strict";
(() => {
  const explorers = JSON.parse(document.getElementById("samples").textContent);
  const ROWS = 10;

  function softmax(logits, temperature) {
    const top = Math.max(...logits);
    const weights = logits.map((z) => Math.exp((z - top) / temperature));
    const sum = weights.reduce((a, b) => a + b, 0);
    return weights.map((w) => w / sum);
  }

  const entropy = (p) => -p.reduce((sum, v) => sum + (v > 0 ? v * Math.log(v) : 0), 0);
  const kl = (p, q) => p.reduce((sum, v, i) => sum + (v > 0 ? v * Math.log(v / Math.max(q[i], 1e-300)) : 0), 0);
  const argmax = (values) => values.indexOf(Math.max(...values));
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

  function element(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  function modelLabel(name, role) {
    const label = element("span", undefined, "model");
    label.append(element("span", undefined, `swatch ${role}`), name);
    return label;
  }

  function explore(form) {
    const number = form.dataset.explorer;
    const { names, models, labels, reference, student, samples } = explorers[Number(number)];
    const slider = form.querySelector("input[type=range]");
    const output = form.querySelector("output");
    const low = Number(slider.dataset.low);
    const high = Number(slider.dataset.high);
    const position = (t) => Math.round((slider.max * Math.log(t / low)) / Math.log(high / low));
    let temperature = Number(slider.dataset.recipe);
    slider.value = position(temperature);

    // Classes in the order of the first model, which the temperature does not change. The label and the top class of
    // every model are always among them.
    function visibleClasses(sample) {
      const logits = sample.logits[0];
      const order = logits.map((_, i) => i).sort((a, b) => logits[b] - logits[a] || a - b);
      const visible = new Set([...order.slice(0, ROWS), ...sample.logits.map(argmax)]);
      if (sample.label !== null) visible.add(sample.label);
      return order.filter((i) => visible.has(i));
    }

    function row(name, shares) {
      const line = element("tr");
      const head = element("th");
      head.scope = "row";
      head.append(name);
      line.append(head);
      shares.forEach((share, i) => {
        const cell = element("td");
        const bar = element("span", undefined, `bar ${models[i]}`);
        bar.style.width = `${(100 * share).toFixed(2)}%`;
        const track = element("span", undefined, "track");
        track.append(bar);
        cell.append(track, element("span", percent(share), "percent"));
        line.append(cell);
      });
      return line;
    }

    function drawDistributions() {
      const sample = samples[Number(new FormData(form).get(`sample${number}`) || 0)];
      const p = sample.logits.map((logits) => softmax(logits, temperature));
      const visible = visibleClasses(sample);
      const rows = visible.map((i) => {
        const name = element("span", names[i]);
        if (i === sample.label) name.append(" ", element("small", "label", "right"));
        return row(name, p.map((q) => q[i]));
      });
      const others = names.length - visible.length;
      if (others > 0) {
        const rest = p.map((q) => Math.max(0, 1 - visible.reduce((sum, i) => sum + q[i], 0)));
        rows.push(row(element("span", `${others} others`), rest));
      }
      form.querySelector("tbody").replaceChildren(...rows);

      const text = `T = ${Number(temperature.toPrecision(3))}`;
      output.textContent = text;
      slider.setAttribute("aria-valuetext", text);

      const from = models.indexOf(reference);
      const to = models.indexOf(student);
      const entropies = labels.map((name, i) => `${name} ${entropy(p[i]).toFixed(3)}`).join(", ");
      form.querySelector(".entropy").textContent =
        `Entropy in nats (maximum ${Math.log(names.length).toFixed(3)}): ${entropies}.` +
        ` KL(${labels[from]} || ${labels[to]}) at this T: ${kl(p[from], p[to]).toFixed(3)}.`;
    }

    function showSample() {
      const card = form.querySelector(".card:has(input:checked)");
      const place = form.querySelector(".sample");
      const image = card.querySelector("img");
      const text = card.querySelector("[data-text]");
      place.replaceChildren();
      if (image) {
        const large = image.cloneNode();
        large.width = large.height = 140;
        place.append(large);
      }
      if (text) place.append(element("blockquote", text.dataset.text));
      place.append(element("p", card.querySelector("input").getAttribute("aria-label"), "note"));
      drawDistributions();
    }

    const head = element("tr");
    head.append(element("th", "Class"));
    labels.forEach((name, i) => {
      const cell = element("th");
      cell.append(modelLabel(name, models[i]));
      head.append(cell);
    });
    for (const cell of head.children) cell.scope = "col";
    form.querySelector("thead").replaceChildren(head);

    slider.addEventListener("input", () => {
      temperature = low * (high / low) ** (slider.value / slider.max);
      drawDistributions();
    });
    for (const button of form.querySelectorAll("[data-set]")) {
      button.addEventListener("click", () => {
        temperature = Number(button.dataset.set);
        slider.value = position(temperature);
        drawDistributions();
      });
    }
    form.querySelector(".cards").addEventListener("change", showSample);
    form.addEventListener("submit", (event) => event.preventDefault());
    showSample();
  }

  document.querySelectorAll("form.explorer").forEach(explore);
})();
