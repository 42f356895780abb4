"use strict";
/* The explorer: draws what DATA (data.js, made by tools/explorer.py) holds, with Observable Plot.
 * Here: data, choices, the page's address; comparison.js and inside.js draw its sections.
 *
 * A probability is a level: the highest step of the threshold that it is above. At threshold
 * step / DATA.steps a sentence is called positive where its level is at least `step`. */

const HALF = DATA.steps / 2;
const PAGE = 10; // sentences that the list shows at first, and that it grows by
const KINDS = ["fixed", "broken", "right", "wrong"];
const KIND_NAMES = {
  fixed: "fixed",
  broken: "broken",
  right: "right in both",
  wrong: "wrong in both",
};
const CHOICES = ["profile", "checkpoint", "method", "setting", "seed"];
const START = {
  profile: "base",
  checkpoint: "75",
  method: "mft_recommended",
  seed: String(DATA.first.seed),
  row: "1",
};
const NARROW = 480; // pixels: below it a plot leaves more of its width to the marks

/** What is chosen; `runs`, `own` (the sentences of an opened dev.tsv) and `view` follow from it. */
const state = { threshold: HALF, row: 0, shown: PAGE, runs: [], own: null, view: null };

const element = (name) => document.getElementById(name);
const percent = (fraction) => `${(100 * fraction).toFixed(1)}\u00a0%`;
const probability = (level) => ((level + 0.5) / DATA.steps).toFixed(3);
const thresholdText = (step) => String(step / DATA.steps);
const unique = (values) => [...new Set(values)];

/* ---------------------------------------------------------------- data */

/** Bytes from base64 of their zlib form. */
async function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Every run as an object, with its levels and the labels of its sentences. */
async function readRuns() {
  const [low, high] = await Promise.all(DATA.predictions.map(decoded));
  const labels = {};
  for (const [name, digits] of Object.entries(DATA.labels)) {
    labels[name] = Uint8Array.from(digits);
  }
  let start = 0;
  return DATA.runs.map(([profile, checkpoint, method, setting, seed, study, pruned]) => {
    const data = DATA.profiles[profile].data;
    const levels = new Uint16Array(labels[data].length);
    for (let row = 0; row < levels.length; row += 1) {
      levels[row] = low[start + row] + 256 * high[start + row];
    }
    start += levels.length;
    const names = { profile, checkpoint, method, setting, seed: String(seed), study, pruned };
    return { ...names, data, levels, labels: labels[data] };
  });
}

/** How many sentences a run gets right at a step of the threshold. */
function rightAt(run, step) {
  let right = 0;
  for (let row = 0; row < run.levels.length; row += 1) {
    right += Number(run.levels[row] >= step) === run.labels[row];
  }
  return right;
}

/** The number of right answers at each step from 0 to DATA.steps. */
function rightAtAll(run) {
  const change = new Int32Array(DATA.steps + 1);
  let right = 0;
  run.levels.forEach((level, row) => {
    right += run.labels[row];
    change[level + 1] += run.labels[row] ? -1 : 1;
  });
  return Array.from(change, (by) => (right += by));
}

/** The step with the most right answers; of several the one nearest to one half. */
function bestStep(run) {
  const right = rightAtAll(run);
  let best = HALF;
  for (let step = 1; step < DATA.steps; step += 1) {
    const nearer = Math.abs(step - HALF) < Math.abs(best - HALF);
    if (right[step] > right[best] || (right[step] === right[best] && nearer)) {
      best = step;
    }
  }
  return best;
}

/** The text of a sentence, or null where the page does not have it. */
function textOf(row, data = state.view.treated.data) {
  const texts = data === "sst2" ? state.own : DATA.sentences[data];
  return texts ? texts[row] : null;
}

/* ---------------------------------------------------------------- choice and address */

/** The runs that agree with the first `count` choices; a treatment is never "no mask". */
function matching(count) {
  const fixed = CHOICES.slice(0, count);
  return state.runs.filter(
    (run) => run.method !== "none" && fixed.every((name) => run[name] === state[name]),
  );
}

/** How the lists call a value. */
function nameOf(choice, value) {
  const names = {
    profile: () => DATA.profiles[value].title,
    checkpoint: () => DATA.checkpoints[value],
    method: () => DATA.treatments[value],
  };
  return names[choice] ? names[choice]() : value;
}

/** Fill a list with options and choose one of them. */
function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = chosen;
}

/** Let each list offer what there is for the choices before it, and keep the choice if it can. */
function settleChoices() {
  CHOICES.forEach((choice, place) => {
    const values = unique(matching(place).map((run) => run[choice]));
    if (choice === "seed") {
      values.sort((one, other) => one - other);
    }
    if (!values.includes(state[choice])) {
      [state[choice]] = values;
    }
    const options = values.map((value) => [value, nameOf(choice, value)]);
    fillSelect(element(choice), options, state[choice]);
  });
}

/** The two runs that are compared, and what does not depend on the threshold. */
function settleView() {
  const [treated] = matching(CHOICES.length);
  const same = ["profile", "checkpoint", "seed"];
  const plain = state.runs.find(
    (run) => run.method === "none" && same.every((name) => run[name] === treated[name]),
  );
  const all = [...plain.levels, ...treated.levels, HALF, state.threshold];
  const [low, high] = d3.extent(all);
  const margin = Math.max(10, Math.round(0.04 * (high - low)));
  const whole = element("whole").checked;
  const domain = whole
    ? [0, DATA.steps]
    : [Math.max(0, low - margin), Math.min(DATA.steps, high + 1 + margin)];
  state.row = Math.min(state.row, treated.levels.length - 1);
  state.view = { plain, treated, domain, curves: [rightAtAll(plain), rightAtAll(treated)] };
}

/** Take the choices from the page's address; what it does not name is as at the start. */
function readAddress() {
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const wanted = { ...START, ...asked };
  CHOICES.forEach((choice) => (state[choice] = wanted[choice]));
  state.threshold = cleanStep(Number(wanted.threshold ?? 0.5) * DATA.steps);
  state.row = Math.max(0, Math.round(Number(wanted.row) || 1) - 1);
  element("whole").checked = wanted.whole === "1";
  element("label").value = ["0", "1"].includes(wanted.label) ? wanted.label : "";
  element("search").value = wanted.search ?? "";
  const hidden = (wanted.hide ?? "").split(",");
  KINDS.forEach((kind) => (element(`show-${kind}`).checked = !hidden.includes(kind)));
  element("strip-runs").value = wanted.runs === "all" ? "all" : "";
  state.masks = [wanted.first, wanted.second];
  state.matrix = wanted.matrix;
}

/** A step of the threshold that the slider can have. */
function cleanStep(step) {
  return Number.isFinite(step) ? Math.min(DATA.steps - 1, Math.max(1, Math.round(step))) : HALF;
}

/** What the page's address says of the choices. */
function address() {
  const said = new URLSearchParams(CHOICES.map((choice) => [choice, state[choice]]));
  said.set("threshold", thresholdText(state.threshold));
  said.set("row", state.row + 1);
  const hidden = KINDS.filter((kind) => !element(`show-${kind}`).checked);
  const more = {
    whole: element("whole").checked ? "1" : "",
    label: element("label").value,
    search: element("search").value,
    hide: hidden.join(","),
    runs: element("strip-runs").value,
    first: DATA.masks ? element("first-mask").value : "",
    second: DATA.masks ? element("second-mask").value : "",
    matrix: DATA.masks ? element("matrix").value : "",
  };
  Object.entries(more).forEach(([name, value]) => value && said.set(name, value));
  return `#${said}`;
}

let addressTimer = null;
/** Write the address a moment after the last change: browsers allow only so many in a time. */
function writeAddress() {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => history.replaceState(null, "", address()), 300);
}

/* ---------------------------------------------------------------- dev.tsv */

/** The sentences of a dev.tsv, checked against our labels; an Error says what to do. */
function readDev(text, labels) {
  const again = "Choose the unchanged dev.tsv of GLUE’s SST-2.";
  const lines = text.replace(/^\ufeff/, "").split(/\r?\n/);
  const header = lines.shift().split("\t");
  const [sentence, label] = ["sentence", "label"].map((name) => header.indexOf(name));
  if (sentence < 0 || label < 0) {
    throw new Error(`This file has no columns “sentence” and “label”. ${again}`);
  }
  const rows = lines.filter((line) => line.trim()).map((line) => line.split("\t"));
  if (rows.length !== labels.length) {
    throw new Error(`This file has ${rows.length} rows, not ${labels.length}. ${again}`);
  }
  const other = rows.findIndex((row, place) => row[label]?.trim() !== String(labels[place]));
  if (other >= 0) {
    throw new Error(`The label of row ${other + 1} is not the one of our test. ${again}`);
  }
  return rows.map((row) => row[sentence].trim());
}

/** Take the sentences of the file that the reader chose. */
async function openDev() {
  const [file] = element("dev").files;
  if (!file) {
    return;
  }
  const message = element("dev-message");
  try {
    state.own = readDev(await file.text(), state.view.treated.labels);
    message.textContent = `The ${state.own.length} sentences of ${file.name} are shown.`;
  } catch (error) {
    state.own = null;
    message.textContent = error.message;
  }
  message.className = state.own ? "" : "refused";
  drawAll();
}

/* ---------------------------------------------------------------- the page */

/** What to look at first, with links that set the view. */
function drawFirst() {
  const { seed, accuracy, step, moved, seeds, gain } = DATA.first;
  const link = (threshold, text) => {
    const said = new URLSearchParams({ ...START, threshold: thresholdText(threshold) });
    return made("a", text, { href: `#${said}` });
  };
  element("first").replaceChildren(
    made("strong", "Look at this first. "),
    `The half-trained MPNet-base of seed ${seed} is right on `,
    link(HALF, `${percent(accuracy)} of the sentences at the usual threshold of 0.5`),
    ", and on ",
    link(step, `${percent(moved)} at ${thresholdText(step)}`),
    `: without any mask. Over its ${seeds} seeds the threshold alone is worth ` +
      `${(100 * gain).toFixed(1)} points on average, chosen on one half of the sentences and ` +
      "counted on the other.",
  );
}

/** Draw what depends on the threshold or on which sentences are shown. */
function drawComparison() {
  drawNumbers();
  drawScatter();
  drawCurve();
  drawSentence();
  drawList();
  drawStrip();
}

/** Draw everything from the choices. */
function drawAll() {
  settleChoices();
  settleView();
  drawComparison();
  drawMasks();
  writeAddress();
}

let frame = null;
/** Draw the comparison once before the next picture, however many changes come until then. */
function drawSoon() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(drawComparison);
  writeAddress();
}

/** Move the threshold; beyond the range that is shown, the range grows. */
function moveThreshold(step) {
  state.threshold = cleanStep(step);
  const [low, high] = state.view.domain;
  if (state.threshold < low || state.threshold > high) {
    settleView();
  }
  drawSoon();
}

/** Show the sentences from the start of the list again. */
function filter() {
  state.shown = PAGE;
  drawSoon();
}

/** Let every control do its work. */
function listen() {
  const on = (name, event, action) => element(name).addEventListener(event, action);
  CHOICES.forEach((choice) =>
    on(choice, "change", () => {
      state[choice] = element(choice).value;
      state.shown = PAGE;
      drawAll();
    }),
  );
  on("threshold", "input", () => moveThreshold(element("threshold").valueAsNumber));
  on("threshold-value", "change", () => {
    const value = element("threshold-value").valueAsNumber;
    moveThreshold(value * DATA.steps);
    element("threshold-value").value = thresholdText(state.threshold);
  });
  on("threshold-half", "click", () => moveThreshold(HALF));
  on("threshold-without", "click", () => moveThreshold(bestStep(state.view.plain)));
  on("threshold-with", "click", () => moveThreshold(bestStep(state.view.treated)));
  on("whole", "change", drawAll);
  KINDS.forEach((kind) => on(`show-${kind}`, "change", filter));
  on("label", "change", filter);
  on("search", "input", filter);
  on("more", "click", () => {
    state.shown += PAGE;
    drawList();
  });
  on("scatter", "pointermove", (event) => {
    const mark = nearest(event, 20);
    if (mark && event.pointerType === "mouse") {
      choose(mark.row);
    }
  });
  on("scatter", "click", (event) => {
    const mark = nearest(event, 30);
    if (mark) {
      choose(mark.row);
    }
  });
  on("scatter", "keydown", stepScatter);
  on("row", "change", () => goTo(element("row").valueAsNumber - 1));
  on("row-before", "click", () => goTo(state.row - 1));
  on("row-after", "click", () => goTo(state.row + 1));
  on("dev", "change", openDev);
  on("strip-runs", "change", () => {
    drawStrip();
    writeAddress();
  });
  ["first-mask", "second-mask", "matrix"].forEach((name) =>
    on(name, "change", () => {
      drawMasks();
      writeAddress();
    }),
  );
  addEventListener("hashchange", () => location.hash.includes("=") && start());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      requestAnimationFrame(drawAll);
    }
  });
}

/** Choose a row by its place, within the data. */
function goTo(row) {
  const last = state.view.plain.levels.length - 1;
  choose(Math.min(last, Math.max(0, Math.round(row) || 0)));
  element("row").value = state.row + 1;
}

/** Set the page as its address says. */
async function start() {
  readAddress();
  await settleMasks();
  drawAll();
}

/** Read the data, then show the page; a browser that cannot is told so. */
async function main() {
  if (typeof DecompressionStream === "undefined") {
    element("trouble").textContent =
      "This browser cannot unpack the data. Open the page with a newer one.";
    return;
  }
  state.runs = await readRuns();
  drawFirst();
  listen();
  await start();
  document.body.dataset.ready = "";
}

main();
