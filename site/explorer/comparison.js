"use strict";
/* With and without a treatment: numbers, plots, the sentence, the list. */

/* ---------------------------------------------------------------- numbers */

/** What becomes of a sentence: one of KINDS. */
function kindOf(row) {
  const { plain, treated } = state.view;
  const label = Boolean(plain.labels[row]);
  const before = plain.levels[row] >= state.threshold === label;
  const after = treated.levels[row] >= state.threshold === label;
  if (before === after) {
    return before ? "right" : "wrong";
  }
  return after ? "fixed" : "broken";
}

/** The sentences that the boxes, the label and the search leave, as rows with their kind. */
function shownRows() {
  const { plain } = state.view;
  const label = element("label").value;
  const words = element("search").value.trim().toLowerCase();
  const rows = [];
  for (let row = 0; row < plain.levels.length; row += 1) {
    const kind = kindOf(row);
    const found = !words || matches(row, words);
    if (element(`show-${kind}`).checked && (!label || +label === plain.labels[row]) && found) {
      rows.push({ row, kind });
    }
  }
  return rows;
}

/** Whether a sentence has some words, or is the row of that number. */
function matches(row, words) {
  if (/^\d+$/.test(words)) {
    return row + 1 === Number(words);
  }
  return (textOf(row) ?? "").toLowerCase().includes(words);
}

/** The large numbers, the threshold's controls and the note on the run. */
function drawNumbers() {
  const { plain, treated, domain } = state.view;
  const count = plain.levels.length;
  const right = [rightAt(plain, state.threshold), rightAt(treated, state.threshold)];
  const points = (100 * (right[1] - right[0])) / count;
  element("accuracy-without").value = percent(right[0] / count);
  element("accuracy-with").value = percent(right[1] / count);
  element("difference").value = signed(points);
  element("treatment-name").textContent = DATA.treatments[treated.method];
  const study = treated.study === "table" ? "the main table" : `the study “${treated.study}”`;
  const pruned = treated.pruned
    ? `, ${percent(treated.pruned)} of the weights in the masked layers pruned`
    : "";
  element("run-note").textContent =
    `${count.toLocaleString("en")} test sentences, ${right[0]} right without and ${right[1]} with; ` +
    `a run of ${study}${pruned}.`;
  const slider = element("threshold");
  slider.min = Math.max(1, domain[0]);
  slider.max = Math.min(DATA.steps - 1, domain[1]);
  slider.value = state.threshold;
  const said = `${percent(right[0] / count)} without treatment, ${percent(right[1] / count)} with`;
  slider.setAttribute("aria-valuetext", `${thresholdText(state.threshold)}: ${said}`);
  if (document.activeElement !== element("threshold-value")) {
    element("threshold-value").value = thresholdText(state.threshold);
  }
  const counted = d3.rollup(d3.range(count), (rows) => rows.length, kindOf);
  KINDS.forEach((kind) => (element(`count-${kind}`).value = counted.get(kind) ?? 0));
}

/** A number with its sign and one decimal. */
function signed(value) {
  const text = Math.abs(value).toFixed(1);
  if (Number(text) === 0) {
    return "0.0";
  }
  return `${value < 0 ? "−" : "+"}${text}`;
}

/* ---------------------------------------------------------------- plots of the comparison */

/** Put a plot in its place, which is an image with a description; the parts of it are hidden. */
function place(name, options, description) {
  const target = element(name);
  const width = Math.max(240, target.clientWidth);
  const plot = Plot.plot({ width, marginRight: 16, ...options(width) });
  plot.setAttribute("aria-hidden", "true");
  target.setAttribute("role", "img");
  target.setAttribute("aria-label", description);
  target.replaceChildren(plot);
  return plot;
}

/** The range that the two runs need, as probabilities. */
function shownDomain() {
  return state.view.domain.map((step) => step / DATA.steps);
}

/** Every sentence by its P(positive) without and with the treatment. */
function drawScatter() {
  const { plain, treated } = state.view;
  const middle = (run) => (point) => (run.levels[point.row] + 0.5) / DATA.steps;
  const [x, y] = [middle(plain), middle(treated)];
  const points = shownRows();
  const of = (kind) => points.filter((point) => point.kind === kind);
  const domain = shownDomain();
  const threshold = state.threshold / DATA.steps;
  const look = { x, y, stroke: "var(--ground)", strokeWidth: 0.5 };
  const plot = place(
    "scatter",
    (width) => ({
      height: Math.min(width, 520),
      marginLeft: 46,
      marginBottom: 40,
      x: { domain, label: "without treatment", labelAnchor: "center", ticks: 5, nice: false },
      y: { domain, label: "with treatment", ticks: 5, nice: false },
      marks: [
        Plot.gridX({ stroke: "var(--faint)", strokeOpacity: 1, ticks: 5 }),
        Plot.gridY({ stroke: "var(--faint)", strokeOpacity: 1, ticks: 5 }),
        Plot.link([domain], {
          x1: domain[0],
          x2: domain[1],
          y1: domain[0],
          y2: domain[1],
          stroke: "var(--line)",
          strokeDasharray: "2 4",
        }),
        Plot.dot(of("right"), { ...look, r: 2.6, fill: "var(--right)" }),
        Plot.dot(of("wrong"), { x, y, r: 3, symbol: "times", stroke: "var(--wrong)" }),
        Plot.dot(of("fixed"), { ...look, r: 4, symbol: "triangle", fill: "var(--fixed)" }),
        Plot.dot(of("broken"), {
          ...look,
          r: 4,
          symbol: "triangle",
          rotate: 180,
          fill: "var(--broken)",
        }),
        Plot.ruleX([threshold], { stroke: "var(--text)", strokeWidth: 1.5 }),
        Plot.ruleY([threshold], { stroke: "var(--text)", strokeWidth: 1.5 }),
      ],
    }),
    scatterText(points),
  );
  const scales = [plot.scale("x"), plot.scale("y")];
  state.marks = points.map((point) => ({
    ...point,
    left: scales[0].apply(x(point)),
    top: scales[1].apply(y(point)),
  }));
  drawRing();
}

/** What the scatter shows, in words. */
function scatterText(points) {
  const counted = d3.rollup(
    points,
    (rows) => rows.length,
    (point) => point.kind,
  );
  const parts = KINDS.map((kind) => `${counted.get(kind) ?? 0} ${KIND_NAMES[kind]}`);
  const start = `P(positive) of ${points.length} sentences without and with the treatment`;
  return `${start}: ${parts.join(", ")}`;
}

/** A ring around the chosen sentence, where it is shown. */
function drawRing() {
  const svg = d3.select("#scatter svg");
  const chosen = state.marks.filter((mark) => mark.row === state.row);
  svg
    .selectAll("circle.ring")
    .data(chosen)
    .join("circle")
    .attr("class", "ring")
    .attr("r", 8)
    .attr("fill", "none")
    .attr("stroke", "var(--text)")
    .attr("stroke-width", 2.5)
    .attr("cx", (mark) => mark.left)
    .attr("cy", (mark) => mark.top);
}

/** The accuracy of both runs at every threshold in the range. */
function drawCurve() {
  const { domain, curves, plain } = state.view;
  const steps = d3.range(Math.max(1, domain[0]), Math.min(DATA.steps, domain[1] + 1));
  const height = (right) => (step) => (100 * right[step]) / plain.levels.length;
  const x = (step) => step / DATA.steps;
  const line = { x, strokeWidth: 2.2, curve: "step-before" };
  const now = { x, r: 5, stroke: "var(--ground)" };
  const [without, treated] = curves.map(height);
  const at = [state.threshold];
  place(
    "curve",
    (width) => ({
      height: Math.min(width, 320),
      marginLeft: 46,
      marginBottom: 40,
      x: { domain: shownDomain(), label: "decision threshold", labelAnchor: "center", ticks: 5 },
      y: { label: "accuracy %", nice: true, ticks: 6, zero: false },
      marks: [
        Plot.gridX({ stroke: "var(--faint)", strokeOpacity: 1, ticks: 5 }),
        Plot.gridY({ stroke: "var(--faint)", strokeOpacity: 1, ticks: 6 }),
        Plot.ruleX(at, { x, stroke: "var(--text)", strokeWidth: 1.5 }),
        Plot.line(steps, { ...line, y: treated, stroke: "var(--with)" }),
        Plot.line(steps, { ...line, y: without, stroke: "var(--text)", strokeDasharray: "5 3" }),
        Plot.dot(at, { ...now, y: treated, fill: "var(--with)" }),
        Plot.dot(at, { ...now, y: without, fill: "var(--text)" }),
      ],
    }),
    `Accuracy by threshold: at ${thresholdText(state.threshold)} it is ` +
      `${without(state.threshold).toFixed(1)} % without and ` +
      `${treated(state.threshold).toFixed(1)} % with the treatment.`,
  );
}

/* ---------------------------------------------------------------- the sentence */

/** Some text in an element of its own. */
function made(tag, text, more = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...more });
}

/** What the page knows of the chosen sentence. */
function drawSentence() {
  const { plain, treated } = state.view;
  const row = state.row;
  const label = plain.labels[row] ? "positive" : "negative";
  const kind = kindOf(row);
  const text = textOf(row);
  const spoken = text ?? `Row ${row + 1} of dev.tsv (its text is not published).`;
  const before = probability(plain.levels[row]);
  const after = probability(treated.levels[row]);
  element("sentence").replaceChildren(
    made("p", spoken),
    made(
      "p",
      `Row ${row + 1}, labelled ${label}. P(positive): ${before} without treatment, ${after} with. ` +
        `At this threshold: ${KIND_NAMES[kind]}.`,
      { className: "note" },
    ),
  );
  element("strip-sentence").textContent = text ? `Row ${row + 1}: ${text}` : spoken;
  const input = element("row");
  input.max = plain.levels.length;
  if (document.activeElement !== input) {
    input.value = row + 1;
  }
  element("own-file").hidden = treated.data !== "sst2";
}

/** The sentences that are shown, those that change most first. */
function drawList() {
  const { plain, treated } = state.view;
  const change = ({ row }) => Math.abs(treated.levels[row] - plain.levels[row]);
  const changed = ({ kind }) => kind === "fixed" || kind === "broken";
  const rows = d3.sort(
    shownRows(),
    (one, other) =>
      d3.descending(changed(one), changed(other)) || d3.descending(change(one), change(other)),
  );
  const visible = rows.slice(0, state.shown);
  const words = element("search").value.trim();
  const noText = words && !/^\d+$/.test(words) && textOf(0) === null;
  element("list-note").textContent = noText
    ? "Open dev.tsv above to search for words, or give a row’s number."
    : `${visible.length} of ${rows.length.toLocaleString("en")} sentences; fixed and broken ones first.`;
  element("more").hidden = visible.length === rows.length;
  element("list").classList.toggle("no-text", textOf(0) === null);
  element("list").tBodies[0].replaceChildren(...visible.map(listRow));
}

/** One line of the list. */
function listRow({ row, kind }) {
  const { plain, treated } = state.view;
  const line = document.createElement("tr");
  line.dataset.row = row;
  line.setAttribute("aria-current", row === state.row);
  const button = made("button", row + 1, { type: "button" });
  button.setAttribute("aria-label", `Row ${row + 1}: show it`);
  button.addEventListener("click", () => choose(row));
  button.addEventListener("focus", () => choose(row));
  const cells = [
    ["", ""],
    ["", textOf(row) ?? ""],
    ["Label", plain.labels[row] ? "positive" : "negative"],
    ["Without", probability(plain.levels[row])],
    ["With", probability(treated.levels[row])],
    ["Result", KIND_NAMES[kind]],
  ].map(([name, text]) => {
    const cell = made("td", text);
    cell.dataset.name = name;
    return cell;
  });
  cells.filter((cell) => !cell.dataset.name).forEach((cell) => cell.removeAttribute("data-name"));
  cells[0].append(button);
  cells[5].className = `is-${kind}`;
  line.append(...cells);
  return line;
}

let stripFrame = null;
/** Choose a sentence: the ring, its text and its strip follow; the list stays as it is. */
function choose(row) {
  if (row === state.row) {
    return;
  }
  state.row = row;
  for (const line of element("list").tBodies[0].rows) {
    line.setAttribute("aria-current", Number(line.dataset.row) === row);
  }
  drawRing();
  drawSentence();
  cancelAnimationFrame(stripFrame);
  stripFrame = requestAnimationFrame(drawStrip);
  writeAddress();
}

/** The mark nearest to a place in the scatter, if any is close. */
function nearest(event, reach) {
  const box = element("scatter").getBoundingClientRect();
  const [left, top] = [event.clientX - box.left, event.clientY - box.top];
  const away = (mark) => Math.hypot(mark.left - left, mark.top - top);
  const found = d3.least(state.marks, away);
  return found && away(found) <= reach ? found : null;
}

/** Go from mark to mark by the arrow keys. */
function stepScatter(event) {
  const axes = { ArrowLeft: ["left", -1], ArrowRight: ["left", 1] };
  Object.assign(axes, { ArrowUp: ["top", -1], ArrowDown: ["top", 1] });
  if (!(event.key in axes) || !state.marks.length) {
    return;
  }
  event.preventDefault();
  const [axis, by] = axes[event.key];
  const order = d3.sort(
    state.marks,
    (mark) => mark[axis],
    (mark) => mark.row,
  );
  const at = order.findIndex((mark) => mark.row === state.row);
  const next = at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + by));
  choose(order[next].row);
}
