// The page's controls. Names are text everywhere: nothing is parsed as markup. A setting is kept in
// the address: #start=natural&raise=METRIC:0.02&hold=METRIC&tolerance=0.005, hold= for none.
const data = JSON.parse(document.getElementById("steering").textContent);
const law = data.law, POINTS = 11, NAMES = data.names;
const byId = (id) => document.getElementById(id);
const shown = (value) => (Math.abs(value) < 1e-4 && value !== 0 ? value.toExponential(1) : value.toFixed(4));
const signed = (value, least) => (Math.abs(value) < least ? "0" : (value > 0 ? "+" : "") + shown(value));

// ── The heat map ────────────────────────────────────────────────────────────────────

function sortable(table) {
  const body = table.tBodies[0], head = [...table.tHead.rows[0].cells];
  const value = (row, place) => {
    const cell = row.cells[place];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  const turn = (cell, among) => {
    const up = cell.getAttribute("aria-sort") !== "ascending";
    among.forEach((other) => other.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    return up ? 1 : -1;
  };
  const button = (cell, sort) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "sort";
    made.textContent = cell.textContent;
    made.addEventListener("click", sort);
    cell.replaceChildren(made);
  };
  head.forEach((cell) => button(cell, () => {
    const place = cell.cellIndex;
    const way = turn(cell, [...table.tHead.rows[0].cells]);
    body.append(...[...body.rows].sort((a, b) => way * order(value(a, place), value(b, place))));
  }));
  [...body.rows].forEach((row) => button(row.cells[0], () => {
    const way = turn(row.cells[0], [...body.rows].map((other) => other.cells[0]));
    const places = [...row.cells].slice(1).map((cell) => cell.cellIndex)
      .sort((a, b) => way * (value(row, a) - value(row, b)));
    for (const line of [table.tHead.rows[0], ...body.rows]) {
      line.append(...places.map((place) => line.cells[place]));
    }
  }));
}

// ── Wishes ──────────────────────────────────────────────────────────────────────────

const state = { start: NAMES[0], better: data.metrics.map(() => 0),
  held: data.metrics.map(() => true), tolerance: 0.005 };

function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (NAMES.includes(asked.get("start"))) state.start = asked.get("start");
  for (const wanted of asked.getAll("raise")) {
    const place = wanted.lastIndexOf(":"), m = data.metrics.indexOf(wanted.slice(0, place));
    if (m >= 0) state.better[m] = Math.max(Number(wanted.slice(place + 1)) || 0, 0);
  }
  if (asked.has("hold")) {
    const held = asked.getAll("hold");
    state.held = data.metrics.map((name) => held.includes(name));
  }
  if (asked.has("tolerance")) state.tolerance = Math.max(Number(asked.get("tolerance")) || 0, 0);
}

function keep() {
  const asked = new URLSearchParams({ start: state.start, tolerance: state.tolerance });
  data.metrics.forEach((name, m) => {
    if (state.better[m] > 0) asked.append("raise", `${name}:${state.better[m]}`);
    if (state.held[m]) asked.append("hold", name);
  });
  if (!state.held.includes(true)) asked.append("hold", "");
  history.replaceState(null, "", `#${asked}`);
}

function control(type, label, act) {
  const made = document.createElement("input");
  made.type = type;
  made.setAttribute("aria-label", label);
  made.addEventListener("input", () => { act(made); keep(); later(); });
  return made;
}

const rows = [...byId("wishes").tBodies[0].rows].map((row, m) => {
  const name = data.metrics[m], asked = document.createElement("output");
  const slider = control("range", `${name}: to get better by`, (one) => {
    state.better[m] = Number(one.value);
  });
  slider.min = 0;
  slider.step = "any";
  const box = control("checkbox", `${name}: held`, (one) => { state.held[m] = one.checked; });
  row.cells[3].append(slider, " ", asked);
  row.cells[4].append(box);
  return { cells: row.cells, slider, asked, box };
});

let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; show(); });
}

let now = [], steered = [];
function show() {
  const start = data.starts[state.start];
  now = losses(law, start);
  const mixture = steer(law, start, wish(now, state.better, state.held, state.tolerance),
    data.low, data.high);
  steered = losses(law, mixture);
  rows.forEach(({ cells, slider, asked, box }, m) => {
    slider.max = Math.max(now[m] - data.best[m], 1e-9);
    slider.value = state.better[m];
    slider.disabled = now[m] - data.best[m] < 1e-6;
    asked.textContent = state.better[m] > 0 ? shown(state.better[m]) : "–";
    box.checked = state.held[m] && !(state.better[m] > 0);
    box.disabled = state.better[m] > 0;
    const change = steered[m] - now[m];
    cells[1].textContent = shown(data.sign[m] * now[m]);
    cells[2].textContent = shown(data.fitted[state.start][m]);
    cells[5].textContent = shown(data.sign[m] * steered[m]);
    cells[6].textContent = signed(data.sign[m] * change, 1e-6);
    cells[6].className = Math.abs(change) < 1e-6 ? "untold" : change < 0 ? "better" : "worse";
    cells[6].style.setProperty("--x", Math.min(Math.abs(change) / (Math.abs(now[m] - data.best[m]) + 1e-9), 1));
  });
  [...byId("steered").tBodies[0].rows].forEach((row, k) => {
    const change = mixture[k] - start[k];
    [start[k].toFixed(4), mixture[k].toFixed(4), signed(change, 5e-5)]
      .forEach((text, place) => { row.cells[place + 1].textContent = text; });
  });
  byId("weights").textContent = JSON.stringify(Object.fromEntries(
    data.parts.flatMap((parts, k) => parts.map(([name, part]) => [name, Number((part * mixture[k]).toFixed(9))]))), null, 1);
  byId("allowed").textContent = `${(100 * state.tolerance).toFixed(1)} %`;
  byId("said").textContent = verdict(start, mixture);
  mark();
}

function verdict(start, mixture) {
  const moves = `${(50 * sum(mixture.map((value, k) => Math.abs(value - start[k])))).toFixed(1)} % of the tokens move.`;
  const asked = data.metrics.map((_, m) => m).filter((m) => state.better[m] > 0);
  if (!asked.length) return `Nothing is asked for: this is the ${state.start} mixture.`;
  const missed = asked.filter((m) => now[m] - steered[m] < 0.999 * state.better[m] - 1e-9);
  if (!missed.length) return `Granted by the law: ${moves} Train it before you believe it.`;
  const far = missed.map((m) =>
    `${data.metrics[m]} gets better by ${shown(Math.max(now[m] - steered[m], 0))} of the ${shown(state.better[m])} asked for`);
  return `Only in part: ${far.join("; ")}. Ask for less, hold less, or allow more. ${moves}`;
}

// ── The front ───────────────────────────────────────────────────────────────────────

function drawn(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

let place = null; // of a pair of values in the picture
function drawFront() {
  const [x, y] = [Number(byId("across").value), Number(byId("up").value)];
  const start = data.starts[NAMES[0]];
  const line = front(law, start, x, y, data.low, data.high, POINTS)
    .map((mixture) => losses(law, mixture)).map((values) => [data.sign[x] * values[x], data.sign[y] * values[y]]);
  const runs = data.runs.map((run) => [run[x], run[y]]).filter(([a, b]) => a !== null && b !== null);
  const ends = [0, 1].map((axis) => {
    const values = [...runs, ...line].map((point) => point[axis]);
    const low = Math.min(...values), high = Math.max(...values), room = 0.04 * (high - low) + 1e-9;
    return [low - room, high + room];
  });
  const along = (value, [low, high]) => (value - low) / (high - low);
  place = ([a, b]) => [70 + 550 * along(a, ends[0]), 360 - 340 * along(b, ends[1])];
  const picture = byId("front");
  picture.replaceChildren(drawn("path", { class: "axis", d: "M70 20V360H620" }));
  for (let tick = 0; tick < 5; tick++) {
    const [a, b] = ends.map(([low, high]) => low + (high - low) * (tick + 0.5) / 5);
    const [left, top] = place([a, b]);
    picture.append(drawn("text", { x: left, y: 380, "text-anchor": "middle" }, a.toFixed(3)),
      drawn("text", { x: 62, y: top + 4, "text-anchor": "end" }, b.toFixed(3)));
  }
  picture.append(drawn("text", { x: 345, y: 408, "text-anchor": "middle" }, data.metrics[x]),
    drawn("text", { x: 70, y: 13 }, data.metrics[y]));
  for (const run of runs) {
    const [cx, cy] = place(run);
    picture.append(drawn("circle", { class: "run", cx, cy, r: 3 }));
  }
  picture.append(drawn("path", { class: "line", d: `M${line.map((point) => place(point).join(" ")).join("L")}` }));
  for (const point of line) {
    const [cx, cy] = place(point), dot = drawn("circle", { class: "point", cx, cy, r: 4 });
    dot.append(drawn("title", {}, point.map(shown).join(", ")));
    picture.append(dot);
  }
  mark();
}

function mark() {
  if (!place) return;
  const picture = byId("front"), pair = [byId("across"), byId("up")].map((one) => Number(one.value));
  const [cx, cy] = place(pair.map((m) => data.sign[m] * now[m]));
  const [x, y] = place(pair.map((m) => data.sign[m] * steered[m]));
  picture.querySelectorAll(".start, .steered").forEach((old) => old.remove());
  picture.append(drawn("rect", { class: "steered", x: x - 5, y: y - 5, width: 10, height: 10 }),
    drawn("circle", { class: "start", cx, cy, r: 8 }));
}

// ── Beginning ───────────────────────────────────────────────────────────────────────

function options(id, names, values, chosen, act) {
  const list = byId(id);
  names.forEach((name, i) => list.append(new Option(name, values[i], false, values[i] === chosen)));
  list.addEventListener("change", act);
}

function begin() {
  read();
  sortable(byId("effects"));
  options("start", NAMES, NAMES, state.start, () => { state.start = byId("start").value; keep(); show(); });
  const tolerance = byId("tolerance");
  tolerance.value = 100 * state.tolerance;
  tolerance.addEventListener("input", () => { state.tolerance = Number(tolerance.value) / 100; keep(); later(); });
  byId("copy").addEventListener("click", () => {
    getSelection().selectAllChildren(byId("weights"));
    document.execCommand("copy");
  });
  for (const hidden of document.querySelectorAll(".controls, #said, #result, #pair")) hidden.hidden = false;
  show();
  if (byId("pair")) {
    const places = data.metrics.map((_, m) => m);
    options("across", data.metrics, places, 0, drawFront);
    options("up", data.metrics, places, 1, drawFront);
    drawFront();
  }
}

begin();
