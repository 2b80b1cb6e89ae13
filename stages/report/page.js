"use strict";
// The browser of rollouts. All text goes in by textContent: completions are untrusted.
(() => {
  const sets = JSON.parse(document.getElementById("rollouts-data").textContent);
  const byId = (id) => document.getElementById(id);
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((fold) => { fold.open = true; }));
  if (!sets.length || !byId("set")) return;
  const COLOURS = { RLoop: "var(--rloop)", RL: "var(--rl)", Base: "var(--base)" };
  const percent = (rate) => rate === null ? "not evaluated" : `${Math.round(100 * rate)} %`;

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function svg(tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function fill(select, texts, chosen) {
    select.replaceChildren(...texts.map((text, index) => element("option", text, { value: index })));
    select.selectedIndex = chosen;
  }

  const current = () => sets[byId("set").selectedIndex];
  const wanted = () => current().problems.filter((problem) => {
    const [kind, other] = byId("kind").value.split(" ");
    return !kind || (kind === "truncated" ? problem.truncated : problem.changes[other] === kind);
  });
  const problem = () => wanted()[byId("problem").selectedIndex];
  const isShown = (rollout) => ({ all: true, correct: rollout.correct, wrong: !rollout.correct,
    truncated: rollout.finish_reason === "length" })[byId("verdicts").value];

  function chooseSet() {
    fill(byId("problem"), wanted().map((p) => p.id), 0);
    show();
  }

  function show() {
    const one = problem();
    byId("chosen").textContent = one ? `${current().name}: problem ${one.id}` : `${current().name}: none of this kind`;
    byId("problem-text").textContent = one ? one.prompt : "";
    byId("answer").textContent = one ? one.answer : "";
    byId("rates").replaceChildren();
    byId("columns").replaceChildren(...(one ? current().policies.map((policy, index) => column(one, policy, index)) : []));
    if (one) drawRates();
  }

  function column(one, policy, index) {
    const cards = one.rollouts[index].filter(isShown).map((rollout) => {
      const card = element("article", undefined, { class: rollout.correct ? "rollout correct" : "rollout" });
      const length = rollout.finish_reason === "length" ? ", truncated" : "";
      card.append(
        element("small", `sample ${rollout.sample}: ${rollout.verdict}, ${rollout.num_tokens} tokens${length}`),
        element("pre", rollout.completion));
      return card;
    });
    if (!cards.length) cards.push(element("p", "none of the samples kept here", { class: "note" }));
    const made = element("section", undefined, { "data-policy": index });
    made.append(element("h3", `${policy.label}: ${percent(one.rates[index])} correct`), ...cards);
    return made;
  }

  function drawRates() {
    if (!problem()) return;
    const { policies } = current(), { rates } = problem();
    const picture = byId("rates");
    const width = picture.clientWidth || 600, height = 190, left = 44, bottom = 30, top = 12;
    const largest = Math.max(1, ...policies.map((policy) => policy.step));
    const x = (step) => left + (width - left - 14) * step / largest;
    const y = (rate) => top + (height - top - bottom) * (1 - rate);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const parts = [0, 0.5, 1].flatMap((rate) => [
      svg("line", { x1: left, x2: width - 14, y1: y(rate), y2: y(rate), stroke: "currentColor", "stroke-opacity": 0.2 }),
      svg("text", { x: left - 6, y: y(rate) + 4, "text-anchor": "end", "font-size": 12, fill: "currentColor" }, percent(rate))]);
    parts.push(svg("text", { x: width - 14, y: height - 6, "text-anchor": "end", "font-size": 12, fill: "currentColor" },
      `RL steps (to ${largest})`));
    const methods = [...new Set(policies.map((policy) => policy.method))].filter((method) => method !== "Base");
    methods.forEach((method, turn) => {
      const colour = COLOURS[method] ?? "currentColor";
      const path = policies.map((policy, index) => ({ ...policy, index, rate: rates[index] }))
        .filter((point) => (point.method === method || point.method === "Base") && point.rate !== null);
      parts.push(svg("polyline", { points: path.map((point) => `${x(point.step)},${y(point.rate)}`).join(" "), fill: "none",
        stroke: colour, "stroke-width": 2 }));
      for (const point of path) {
        const dot = svg("circle", { cx: x(point.step), cy: y(point.rate), r: 6, stroke: colour, "stroke-width": 2,
          fill: point.after_rft ? "var(--paper)" : colour, "data-policy": point.index });
        dot.append(svg("title", {}, `${point.label}: ${percent(point.rate)}`));
        dot.addEventListener("click", () => {
          const at = byId("columns").children[point.index];
          byId("columns").scrollLeft = at.offsetLeft - byId("columns").offsetLeft;
        });
        parts.push(dot);
      }
      const name = method.length > 12 ? `${method.slice(0, 11)}…` : method;
      parts.push(svg("text", { x: left + 105 * turn, y: height - 6, "font-size": 13, fill: colour }, `● ${name}`));
    });
    picture.replaceChildren(...parts);
  }

  fill(byId("set"), sets.map((set) => set.name), 0);
  byId("set").addEventListener("change", chooseSet);
  byId("kind").addEventListener("change", chooseSet);
  for (const id of ["problem", "verdicts"]) byId(id).addEventListener("change", show);
  window.addEventListener("resize", drawRates);
  chooseSet();
})();
