"use strict";
/* One sentence in all runs, and where masks put their zeros. */

/* ---------------------------------------------------------------- one sentence in all runs */

/** The chosen sentence in every run on it. */
function stripRuns() {
  const { treated } = state.view;
  const all = element("strip-runs").value === "all";
  return state.runs
    .filter((run) => run.data === treated.data && (all || run.profile === treated.profile))
    .map((run) => {
      const level = run.levels[state.row];
      const right = level >= state.threshold === Boolean(run.labels[state.row]);
      const model = DATA.profiles[run.profile].title.split(",")[0];
      const checkpoint = DATA.checkpoints[run.checkpoint];
      const treatment = DATA.treatments[run.method];
      return { ...run, level, right, model, checkpoint, treatment };
    });
}

/** A strip of marks for each treatment, a panel for each checkpoint. */
function drawStrip() {
  const runs = stripRuns();
  const models = unique(runs.map((run) => run.model));
  const groups = unique(runs.map(panelOf));
  const target = element("strip");
  target.replaceChildren(
    ...groups.map((group) => {
      const box = document.createElement("figure");
      box.append(made("figcaption", models.length > 1 ? group : group.split(", ")[1]));
      const inside = made("div", "", { id: `strip-${groups.indexOf(group)}`, className: "plot" });
      box.append(inside);
      return box;
    }),
  );
  groups.forEach((group, place) => drawStripPanel(place, group, runs));
  drawStripTable(runs);
}

/** The panel of the strip that a run belongs to. */
function panelOf(run) {
  return `${run.model}, ${run.checkpoint}`;
}

/** One panel of the strip. */
function drawStripPanel(number, group, runs) {
  const mine = runs.filter((run) => panelOf(run) === group);
  const treatments = unique(mine.map((run) => run.treatment));
  const x = (run) => (run.level + 0.5) / DATA.steps;
  const title = (run) =>
    `${run.treatment}, ${run.setting}, seed ${run.seed}: ${probability(run.level)}, ` +
    (run.right ? "right" : "wrong");
  const mark = { x, y: "treatment", title, tip: true };
  place(
    `strip-${number}`,
    (width) => ({
      height: 40 + 19 * treatments.length,
      marginLeft: 168,
      marginTop: 6,
      marginBottom: 34,
      x: {
        domain: [0, 1],
        label: "P(positive)",
        labelAnchor: "center",
        ticks: width < NARROW ? 3 : 6,
      },
      y: { domain: treatments, label: null, tickSize: 0 },
      marks: [
        Plot.ruleY(treatments, { stroke: "var(--faint)" }),
        Plot.ruleX([state.threshold / DATA.steps], { stroke: "var(--text)", strokeWidth: 1.5 }),
        Plot.dot(
          mine.filter((run) => run.right),
          { ...mark, r: 3.2, fill: "var(--with)", fillOpacity: 0.75 },
        ),
        Plot.dot(
          mine.filter((run) => !run.right),
          { ...mark, r: 3.2, symbol: "times", stroke: "var(--wrong)" },
        ),
      ],
    }),
    `P(positive) of the sentence in ${mine.length} runs of ${group}; the table below has them.`,
  );
}

/** The strip as a table, a row for each checkpoint and treatment. */
function drawStripTable(runs) {
  const grouped = d3.group(runs, (run) => `${panelOf(run)}, ${run.treatment}`);
  const lines = [...grouped.values()].map((some) => {
    const [low, high] = d3.extent(some, (run) => run.level).map(probability);
    const right = some.filter((run) => run.right).length;
    const { model, checkpoint, treatment } = some[0];
    const range = low === high ? low : `${low} to ${high}`;
    return tableRow([model, checkpoint, treatment, some.length, right, range]);
  });
  element("strip-table").tBodies[0].replaceChildren(...lines);
}

/** A row of plain cells. */
function tableRow(texts) {
  const line = document.createElement("tr");
  line.append(...texts.map((text) => made("td", text)));
  return line;
}

/* ---------------------------------------------------------------- masks */

/** Fill the lists of masks and matrices, or leave the section out. */
async function settleMasks() {
  const { masks } = DATA;
  element("masks").hidden = !masks;
  if (!masks) {
    return;
  }
  const names = Object.keys(masks.titles);
  const options = names.map((name) => [name, masks.titles[name]]);
  const start = ["seed0-90-mft_recommended", "seed0-75-mft_recommended"];
  const pick = (place) => [state.masks[place], start[place], names[place]].find(isMask);
  fillSelect(element("first-mask"), options, pick(0));
  fillSelect(element("second-mask"), options, pick(1));
  const matrices = masks.matrices.map((matrix, place) => [String(place), matrixName(matrix)]);
  const known = matrices.some(([value]) => value === state.matrix);
  fillSelect(element("matrix"), matrices, known ? state.matrix : "0");
  state.blocks ??= Object.fromEntries(
    await Promise.all(names.map(async (name) => [name, await decoded(masks.blocks[name])])),
  );
}

/** Whether a name is one of the published masks. */
function isMask(name) {
  return name in DATA.masks.titles;
}

/** How the page calls a matrix. */
function matrixName(matrix) {
  return `layer ${matrix.layer}, ${matrix.kind}`;
}

/** What two masks share; a mask shares all its zeros with itself. */
function sharedBy(first, second) {
  const { shared, zeros } = DATA.masks;
  return shared[`${first} ${second}`] ?? shared[`${second} ${first}`] ?? zeros[first];
}

/** Everything about the two chosen masks. */
function drawMasks() {
  if (!DATA.masks) {
    return;
  }
  const first = element("first-mask").value;
  const second = element("second-mask").value;
  const rows = overlapRows(first, second);
  const { titles } = DATA.masks;
  drawOverlapAnswer(rows, titles[first], titles[second]);
  drawOverlap(rows);
  drawHeadOverlap(first, second);
  const heads = [first, second].map(headShares);
  const [least, most] = d3.extent(heads.flat(), (cell) => cell.share);
  const domain = [Math.min(8, least), Math.max(12, most)];
  element("heads-note").textContent =
    "Each mask sets about 10 % of a matrix to zero. The stronger a colour, the more zeros: " +
    `${domain.map((share) => share.toFixed(0)).join(" to ")}\u00a0%.`;
  const matrix = Number(element("matrix").value);
  [first, second].forEach((name, place) => {
    const side = place ? "second" : "first";
    element(`heads-${side}-name`).textContent = titles[name];
    element(`blocks-${side}-name`).textContent = titles[name];
    drawHeads(`heads-${side}`, heads[place], domain, titles[name]);
    drawBlocks(`blocks-${side}`, name, matrix, [first, second]);
  });
  drawMaskTable(rows);
}

/** For each matrix how many zeros two masks have, share, and would share by chance. */
function overlapRows(first, second) {
  const { matrices, zeros } = DATA.masks;
  const both = sharedBy(first, second).matrices;
  return matrices.map((matrix, place) => {
    const weights = matrix.shape[0] * matrix.shape[1];
    const [here, there] = [first, second].map((name) => zeros[name].matrices[place]);
    const chance = (here * there) / weights;
    return {
      ...matrix,
      title: matrixName(matrix),
      weights,
      here,
      there,
      both: both[place],
      chance,
    };
  });
}

/** One sentence on how far two masks agree. */
function drawOverlapAnswer(rows, first, second) {
  const [both, here, chance] = ["both", "here", "chance"].map((name) =>
    d3.sum(rows, (row) => row[name]),
  );
  element("overlap-answer").textContent =
    `Of the zeros of “${first}”, ${percent(both / here)} are zeros of “${second}” too; ` +
    `by chance it would be ${percent(chance / here)}.`;
}

/** The overlap of each matrix, with its chance level. */
function drawOverlap(rows) {
  place(
    "overlap",
    () => ({
      height: 50 + 24 * rows.length,
      marginLeft: 158,
      marginBottom: 40,
      x: {
        domain: [0, 100],
        label: "% of the first mask’s zeros",
        labelAnchor: "center",
        ticks: 5,
      },
      y: { domain: rows.map((row) => row.title), label: null, tickSize: 0 },
      marks: [
        Plot.gridX({ stroke: "var(--faint)", strokeOpacity: 1, ticks: 5 }),
        Plot.barX(rows, {
          x: (row) => (100 * row.both) / row.here,
          y: "title",
          fill: "var(--with)",
          fillOpacity: 0.6,
          insetTop: 3,
          insetBottom: 3,
        }),
        Plot.tickX(rows, {
          x: (row) => (100 * row.chance) / row.here,
          y: "title",
          stroke: "var(--wrong)",
          strokeWidth: 2.5,
        }),
      ],
    }),
    "Overlap of the two masks by matrix; the table below has the numbers.",
  );
}

/** The fraction of zeros in each head of each matrix that has heads. */
function headShares(name) {
  const { zeros } = DATA.masks;
  return headCells(zeros[name].heads, (count, place, matrix) => {
    return (100 * count) / ((matrix.shape[0] * matrix.shape[1]) / DATA.masks.heads);
  });
}

/** Cells of a picture by head, from a count for each head of each matrix. */
function headCells(counts, shareOf) {
  return DATA.masks.matrices.flatMap((matrix, place) =>
    counts[place].map((count, head) => ({
      title: matrixName(matrix),
      head,
      share: shareOf(count, place, matrix, head),
    })),
  );
}

/** A picture by head: of zeros in percent. */
function drawHeads(name, cells, domain, title) {
  drawCells(
    name,
    cells,
    domain,
    `Zeros in each attention head of the mask “${title}”, in percent.`,
  );
}

/** A picture by head of the fraction of the first mask's zeros that the second has too. */
function drawHeadOverlap(first, second) {
  const { zeros } = DATA.masks;
  const cells = headCells(sharedBy(first, second).heads, (count, place, _, head) => {
    return (100 * count) / zeros[first].heads[place][head];
  });
  const most = Math.max(
    20,
    d3.max(cells, (cell) => cell.share),
  );
  drawCells(
    "overlap-heads",
    cells,
    [0, most],
    "Overlap of the two masks by attention head, in percent.",
  );
}

/** Cells by matrix and head, the number written where there is room. */
function drawCells(name, cells, domain, description) {
  const titles = unique(cells.map((cell) => cell.title));
  place(
    name,
    (width) => ({
      height: 60 + 30 * titles.length,
      marginLeft: 158,
      marginBottom: 40,
      marginTop: 6,
      x: {
        label: "attention head",
        labelAnchor: "center",
        tickSize: 0,
        tickFormat: (head) => (width < NARROW && head % 2 ? "" : head + 1),
      },
      y: { domain: titles, label: null, tickSize: 0 },
      color: { type: "linear", domain, range: heat() },
      marks: [
        Plot.cell(cells, {
          x: "head",
          y: "title",
          fill: "share",
          inset: 0.5,
          tip: width < 520,
          title: cellText,
        }),
        width < 520
          ? null
          : Plot.text(cells, {
              x: "head",
              y: "title",
              text: (cell) => cell.share.toFixed(0),
              fill: (cell) => inkOn(cell.share, domain),
            }),
      ],
    }),
    description,
  );
}

/** What a cell says when it is pointed at. */
function cellText(cell) {
  return `${cell.title}, head ${cell.head + 1}: ${cell.share.toFixed(1)} %`;
}

/** From little to much, in the scheme of the page. */
function heat() {
  return isDark() ? ["#1e242b", "#9fd4ff"] : ["#f4f6f8", "#00497a"];
}

/** Black or white, whichever can be read better on a colour of `heat`. */
function inkOn(share, [low, high]) {
  const colour = d3.rgb(d3.interpolateRgb(...heat())((share - low) / (high - low)));
  const [red, green, blue] = [colour.r, colour.g, colour.b].map((value) => (value / 255) ** 2.2);
  const light = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return light > 0.18 ? "#000000" : "#ffffff";
}

/** Whether the page is drawn light on dark. */
function isDark() {
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The fraction of zeros in blocks of one matrix. */
function drawBlocks(target, name, matrix, both) {
  const { grid } = DATA.masks;
  const size = grid * grid;
  const of = (mask) => state.blocks[mask].subarray(matrix * size, (matrix + 1) * size);
  const cells = Array.from(of(name), (byte, place) => ({
    row: Math.floor(place / grid),
    column: place % grid,
    share: (100 * byte) / 255,
  }));
  const most = (100 * d3.max(both.map((mask) => d3.max(of(mask))))) / 255;
  element("blocks-note").textContent =
    `A block is a ${grid}th of the inputs and of the outputs. The stronger its colour, the more ` +
    `zeros: none to ${most.toFixed(0)}\u00a0%.`;
  place(
    target,
    (width) => ({
      width: Math.min(width, 420),
      height: Math.min(width, 420),
      marginLeft: 24,
      marginRight: 4,
      marginBottom: 24,
      marginTop: 4,
      x: { label: "inputs", labelAnchor: "center", labelOffset: 20, ticks: [], padding: 0 },
      y: { label: "outputs", labelAnchor: "center", labelOffset: 20, ticks: [], padding: 0 },
      color: { type: "linear", domain: [0, most], range: heat() },
      marks: [
        Plot.cell(cells, {
          x: "column",
          y: "row",
          fill: "share",
          inset: 0.25,
          tip: true,
          title: (cell) => `${cell.share.toFixed(1)} % zeros`,
        }),
      ],
    }),
    `Zeros of the mask “${DATA.masks.titles[name]}” in ${grid} times ${grid} blocks of a matrix.`,
  );
}

/** All counts of the two masks. */
function drawMaskTable(rows) {
  const number = (value) => Math.round(value).toLocaleString("en");
  const lines = rows.map((row) =>
    tableRow([
      row.layer,
      row.kind,
      ...[row.weights, row.here, row.there, row.both, row.chance].map(number),
    ]),
  );
  element("mask-table").tBodies[0].replaceChildren(...lines);
}
