"use strict";
// All texts go into the page as text (textContent), so none of them can become markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const NAMES = { encoder: "Encoder self-attention", decoder: "Decoder self-attention", cross: "Cross-attention" };
const SHORT = { encoder: "Encoder", decoder: "Decoder", cross: "Cross" };
const AXES = {
  encoder: "Rows: source tokens. Columns: the source tokens that they attend to.",
  decoder: "Rows: the token that is predicted. Columns: the tokens that the decoder has read.",
  cross: "Rows: the token that is predicted. Columns: the source tokens that the decoder attends to.",
};
const FATES = {
  extended: "extended", pruned: "pruned: no extension was among the best", open: "unfinished when the search stopped",
  cut: "result, cut at the maximum length", finished: "result", displaced: "ended, but better ones displaced it",
};
const MEAN = "mean";
const view = { sentence: 0, kind: "", layer: Infinity, head: MEAN, output: 0 };
let sentence = null;

// --- building

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** A token: its sign for a space is pale. */
function piece(name, text) {
  const element = make(name, { dir: "auto" });
  for (const part of text.split(/(\u2581)/u)) {
    if (part) element.append(part === "\u2581" ? make("span", { className: "mark" }, part) : part);
  }
  return element;
}

const isSpecial = (text) => /^<.*>$/u.test(text);
const isUpright = (text) => /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u.test(text);
const number = (value, digits) => value.toFixed(digits).replace("-", "\u2212");

// --- colours: one hue, from light to dark, so that lightness alone tells the weight. Small weights are spread out.

const STOPS = [[255, 255, 255], [214, 230, 245], [134, 181, 220], [46, 112, 176], [8, 42, 92]];

const shade = (weight) => Math.min(Math.max(weight, 0), 1) ** 0.65;

function colour(weight) {
  const at = shade(weight) * (STOPS.length - 1);
  const below = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[below].map((value, i) => Math.round(value + (at - below) * (STOPS[below + 1][i] - value)));
}

function paint(element, weight) {
  element.style.background = `rgb(${colour(weight)})`;
  element.style.color = shade(weight) > 0.6 ? "#fff" : "";
}

// --- weights

function decoded({ shape, values }) {
  const bytes = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0));
  const reader = new DataView(bytes.buffer);
  return { shape, values: Float32Array.from({ length: bytes.length / 4 }, (_, i) => reader.getFloat32(4 * i, true)) };
}

/** The weights [rows][columns] of a layer and a head, or of the mean of its heads. */
function matrixOf(kind, layer, head) {
  const { shape: [, heads, rows, columns], values } = sentence.kinds[kind];
  const chosen = head === MEAN ? [...Array(heads).keys()] : [head];
  return Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => {
    const weights = chosen.map((n) => values[((layer * heads + n) * rows + row) * columns + column]);
    return weights.reduce((sum, weight) => sum + weight, 0) / chosen.length;
  }));
}

/** The tokens of rows and columns. The decoder has read the start token and all tokens before the predicted one. */
function axesOf(kind) {
  const { source, target, start } = sentence;
  if (kind === "encoder") return { rows: source, columns: source };
  return { rows: target, columns: kind === "cross" ? source : [start, ...target.slice(0, -1)] };
}

/** The elements above the matrix that stand for its rows and columns. */
function elementsOf(kind) {
  const source = [...byId("source").children], all = [...byId("target").children], target = all.slice(1);
  if (kind === "encoder") return { rows: source, columns: source };
  return { rows: target, columns: kind === "cross" ? source : all.slice(0, -1) };
}

let matrix = [];

// --- what is looked at

function clear() {
  for (const token of document.querySelectorAll(".tokens li")) {
    token.classList.remove("query", "painted");
    token.style.background = token.style.color = "";
    token.querySelector("small").textContent = token.dataset.value ?? "";
  }
  const table = byId("matrix");
  table.classList.remove("focused");
  for (const element of table.querySelectorAll(".on, .near")) element.classList.remove("on", "near");
  const probabilities = "Below the translation is the probability of each token.";
  byId("readout").textContent = view.kind
    ? `${probabilities} Hover over a token or a cell to see what it attends to.` : probabilities;
}

/** Shows a row (what a token attends to) or a column (what attends to a token); a cell is in a row. */
function look(row, column) {
  clear();
  const elements = elementsOf(view.kind), axes = axesOf(view.kind), table = byId("matrix");
  const isRow = row !== null;
  const weights = isRow ? matrix[row] : matrix.map((each) => each[column]);
  const painted = isRow ? elements.columns : elements.rows;
  const names = isRow ? axes.columns : axes.rows;
  (isRow ? elements.rows[row] : elements.columns[column]).classList.add("query");
  painted.forEach((element, i) => {
    paint(element, weights[i]);
    element.classList.add("painted");
    element.querySelector("small").textContent = number(weights[i], 3);
  });
  table.classList.add("focused");
  for (const cell of table.querySelectorAll("td[data-row]")) {
    const near = isRow ? Number(cell.dataset.row) === row : Number(cell.dataset.column) === column;
    cell.classList.toggle("near", near);
  }
  if (isRow) table.querySelector(`th[data-row="${row}"]`).classList.add("on");
  if (column !== null) table.querySelector(`th[data-column="${column}"]`).classList.add("on");
  const readout = byId("readout");
  readout.replaceChildren();
  if (isRow && column !== null) {
    readout.append(piece("bdi", axes.rows[row]), " attends to ", piece("bdi", names[column]), " with weight ");
    readout.append(make("i", {}, number(weights[column], 4)), ". ");
  }
  readout.append(piece("bdi", isRow ? axes.rows[row] : axes.columns[column]));
  readout.append(isRow ? " attends most to " : " is attended to most by ");
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
  order.forEach((i, n) => {
    readout.append(n ? ", " : "", piece("bdi", names[i]), " ", make("i", {}, number(weights[i], 3)));
  });
  readout.append(".");
}

function lookFrom(target) {
  const token = target.closest(".tokens li"), cell = target.closest("#matrix [data-row], #matrix [data-column]");
  if (!view.kind || !(token || cell)) return;
  if (cell) {
    const { row, column } = cell.dataset;
    look(row === undefined ? null : Number(row), column === undefined ? null : Number(column));
    return;
  }
  const elements = elementsOf(view.kind), row = elements.rows.indexOf(token), column = elements.columns.indexOf(token);
  if (row >= 0) look(row, null);
  else if (column >= 0) look(null, column);
}

for (const [begins, ends] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  for (const id of ["source", "target", "matrix"]) {
    byId(id).addEventListener(begins, (event) => lookFrom(event.target));
    byId(id).addEventListener(ends, clear);
  }
}

// --- the sentence and its translation

function showTokens(id, tokens, direction, values) {
  const list = byId(id);
  list.dir = direction;
  list.replaceChildren(...tokens.map((text, i) => {
    const item = make("li", { tabIndex: 0, className: isSpecial(text) ? "special" : "" });
    item.dataset.value = values[i] ?? "";
    item.append(piece("b", text), make("small", {}, item.dataset.value));
    return item;
  }));
}

function showSentence() {
  const { source, target, start, direction, targetDirection, hypotheses } = sentence;
  showTokens("source", source, direction, []);
  const probabilities = hypotheses[0].probabilities.map((p) => number(p, 3));
  showTokens("target", [start, ...target], targetDirection, ["", ...probabilities]);
}

// --- the choice of an attention

function options(id, names, values, chosen, choose) {
  const group = make("div");
  values.forEach((value, i) => {
    const input = make("input", { type: "radio", name: id, id: `${id}-${value}`, checked: value === chosen });
    input.addEventListener("change", () => choose(value));
    group.append(make("label", {}, input, make("span", {}, names[i])));
  });
  byId(id).replaceChildren(byId(id).firstElementChild, group);
}

function showChoices() {
  const kinds = Object.keys(NAMES).filter((kind) => kind in sentence.kinds);
  byId("pictures").hidden = !kinds.length;
  if (!kinds.length) {
    view.kind = "";
    byId("target").firstElementChild.hidden = true;
    clear();
    return;
  }
  if (!kinds.includes(view.kind)) view.kind = kinds.at(-1);
  const [layers, heads] = sentence.kinds[view.kind].shape;
  view.layer = Math.min(view.layer, layers - 1);
  if (view.head !== MEAN) view.head = Math.min(view.head, heads - 1);
  if (heads === 1) view.head = 0;
  const set = (name) => (value) => { view[name] = value; showChoices(); };
  const range = (length) => [...Array(length).keys()];
  options("kinds", kinds.map((kind) => SHORT[kind]), kinds, view.kind, set("kind"));
  options("layers", range(layers).map((n) => n + 1), range(layers), view.layer, set("layer"));
  const all = heads === 1 ? range(1) : [MEAN, ...range(heads)];
  options("heads", all.map((n) => (n === MEAN ? "Mean" : n + 1)), all, view.head, set("head"));
  byId("target").firstElementChild.hidden = view.kind !== "decoder";
  showOverview(layers, heads);
  showMatrix();
  clear();
}

function showMatrix() {
  matrix = matrixOf(view.kind, view.layer, view.head);
  const { rows, columns } = axesOf(view.kind);
  const head = view.head === MEAN ? "mean of heads" : `head ${view.head + 1}`;
  byId("caption").replaceChildren(
    make("strong", {}, `${NAMES[view.kind]}, layer ${view.layer + 1}, ${head}`), make("br"), AXES[view.kind]);
  const table = byId("matrix"), panels = document.querySelector(".panels");
  const beside = document.querySelector(".overview").offsetWidth + 48, whole = panels.clientWidth - 150;
  const room = Math.floor((whole - beside) / columns.length) - 1 < 30 ? whole : whole - beside;
  const cell = Math.min(Math.max(Math.floor(room / columns.length) - 1, 16), 44);
  table.style.setProperty("--cell", `${cell}px`);
  const label = (text) => {
    const span = piece("span", text);
    span.title = text;
    span.classList.toggle("upright", isUpright(text));
    return span;
  };
  const top = make("tr", {}, make("td"), ...columns.map((text, column) => {
    const header = make("th", { scope: "col" }, label(text));
    header.dataset.column = column;
    return header;
  }));
  const body = rows.map((text, row) => {
    const header = make("th", { scope: "row" }, label(text));
    header.dataset.row = row;
    return make("tr", {}, header, ...matrix[row].map((weight, column) => {
      const item = make("td", {}, cell >= 30 && weight >= 0.005 ? number(weight, 2) : "");
      item.title = `${text} \u2192 ${columns[column]}: ${number(weight, 4)}`;
      Object.assign(item.dataset, { row, column, weight: weight.toPrecision(9) });
      paint(item, weight);
      return item;
    }));
  });
  table.replaceChildren(make("thead", {}, top), make("tbody", {}, ...body));
}

function showOverview(layers, heads) {
  const overview = byId("overview");
  overview.parentElement.parentElement.hidden = layers * heads === 1;
  overview.style.gridTemplateColumns = `repeat(${heads + 1}, auto)`;
  const items = [make("span"), ...Array.from({ length: heads }, (_, n) => make("span", {}, `Head ${n + 1}`))];
  for (let layer = 0; layer < layers; layer++) {
    items.push(make("span", {}, `Layer ${layer + 1}`));
    for (let head = 0; head < heads; head++) items.push(thumbnail(layer, head, heads));
  }
  overview.replaceChildren(...items);
}

function thumbnail(layer, head, heads) {
  const weights = matrixOf(view.kind, layer, head), canvas = make("canvas");
  canvas.height = weights.length;
  canvas.width = weights[0].length;
  const width = Math.min(Math.max(Math.floor(420 / heads), 36), 72);
  const height = Math.round(width * Math.min(Math.max(canvas.height / canvas.width, 0.4), 2));
  const imageRendering = canvas.width > width ? "auto" : "pixelated";
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px`, imageRendering });
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  weights.flat().forEach((weight, i) => image.data.set([...colour(weight), 255], 4 * i));
  context.putImageData(image, 0, 0);
  const button = make("button", { type: "button", title: `Layer ${layer + 1}, head ${head + 1}` }, canvas);
  button.setAttribute("aria-label", button.title);
  button.setAttribute("aria-pressed", layer === view.layer && head === view.head);
  button.addEventListener("click", () => { Object.assign(view, { layer, head }); showChoices(); });
  return button;
}

// --- aligned words

function showWords() {
  const { sourceWords, targetWords, alignment, direction, targetDirection } = sentence;
  byId("words").hidden = !alignment.length;
  byId("alignment").parentElement.dir = direction;  // a wide one is seen from its beginning
  byId("alignment").classList.toggle("facing", direction !== targetDirection);
  const fill = (id, words, dir) => {
    byId(id).dir = dir;
    byId(id).replaceChildren(...words.map((word) => make("li", { dir: "auto", tabIndex: 0 }, word)));
  };
  fill("source-words", sourceWords, direction);
  fill("target-words", targetWords, targetDirection);
  drawAlignment();
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function drawAlignment() {
  const box = byId("alignment"), origin = box.getBoundingClientRect();
  const sources = byId("source-words").children, targets = byId("target-words").children;
  const paths = sentence.alignment.map(([from, to]) => {
    const above = sources[from].getBoundingClientRect(), below = targets[to].getBoundingClientRect();
    const [x, y] = [above.left + above.width / 2 - origin.left, above.bottom - origin.top];
    const [u, v] = [below.left + below.width / 2 - origin.left, below.top - origin.top];
    const middle = (y + v) / 2;
    const path = svg("path", { d: `M${x},${y} C${x},${middle} ${u},${middle} ${u},${v}` });
    Object.assign(path.dataset, { from, to });
    return path;
  });
  box.querySelector("svg").replaceChildren(...paths);
}

function lookAtWord(event) {
  const word = event.target.closest("li"), box = byId("alignment");
  for (const element of box.querySelectorAll(".on")) element.classList.remove("on");
  const begins = event.type === "pointerover" || event.type === "focusin";
  box.classList.toggle("focused", Boolean(word) && begins);
  if (!word || !begins) return;
  const side = word.parentElement.id === "source-words" ? "from" : "to", index = [...word.parentElement.children].indexOf(word);
  word.classList.add("on");
  for (const path of box.querySelectorAll(`path[data-${side}="${index}"]`)) {
    path.classList.add("on");
    byId("source-words").children[path.dataset.from].classList.add("on");
    byId("target-words").children[path.dataset.to].classList.add("on");
  }
}

for (const name of ["pointerover", "pointerout", "focusin", "focusout"]) byId("alignment").addEventListener(name, lookAtWord);

// --- outputs

function showOutputs() {
  const rows = sentence.hypotheses.map((hypothesis, rank) => {
    const button = make("button", { type: "button", title: "Show its path through the beam" }, `${rank + 1}`);
    button.addEventListener("click", () => { view.output = rank; choosePath(); showEnd(); });
    const text = make("p", { dir: "auto" }, hypothesis.text || "(an empty output)");
    if (!hypothesis.finished) text.append(make("em", { dir: "ltr" }, "cut at the maximum length"));
    const tokens = hypothesis.finished ? [...hypothesis.tokens, sentence.end] : hypothesis.tokens;
    const list = make("ol", { dir: sentence.targetDirection }, ...tokens.map((token, i) => {
      const bar = make("u"), item = make("li", {}, piece("span", token), make("i", {}, bar));
      bar.style.width = `${100 * hypothesis.probabilities[i]}%`;
      item.title = `probability ${number(hypothesis.probabilities[i], 4)}`;
      return item;
    }));
    return make("tr", {}, make("td", {}, button), make("td", {}, number(hypothesis.score, 4)), make("td", {}, text, list));
  });
  byId("hypotheses").tBodies[0].replaceChildren(...rows);
}

// --- the beam

const STEP = { width: 132, height: 48, top: 26, left: 2, box: 104, middle: 19 };

function placeOf(node) {
  const { beamSize } = sentence.tree, ended = node.ended ? beamSize + 0.35 : 0;
  return [STEP.left + node.step * STEP.width, STEP.top + (ended + node.place) * STEP.height];
}

function showTree() {
  const { nodes, beamSize } = sentence.tree;
  for (const node of nodes) node.ended = node.fate === "displaced" || node.fate === "finished";
  const lanes = beamSize + 0.35 + Math.max(0, ...nodes.filter((node) => node.ended).map((node) => node.place + 1));
  const steps = Math.max(0, ...nodes.map((node) => node.step)), tree = byId("tree");
  const width = STEP.left + steps * STEP.width + STEP.box + 4, height = STEP.top + lanes * STEP.height;
  Object.assign(tree.style, { width: `${width}px`, height: `${height}px` });
  const drawing = svg("svg", { width, height, "aria-hidden": "true" });
  const at = (element, [x, y]) => { Object.assign(element.style, { left: `${x}px`, top: `${y}px` }); return element; };
  const root = at(make("div", { className: "extended" }, piece("b", sentence.start), make("small", {}, "start")), placeOf({ step: 0, place: 0 }));
  const items = [drawing, root];
  for (let step = 1; step <= steps; step++) {
    const header = at(make("span", {}, `Step ${step}`), [STEP.left + step * STEP.width, 0]);
    header.style.width = `${STEP.box}px`;
    items.push(header);
  }
  nodes.forEach((node, index) => {
    const value = node.rank === null ? number(node.total, 2) : `#${node.rank + 1}  ${number(node.score, 3)}`;
    const box = at(make("div", { className: node.fate, tabIndex: 0 }, piece("b", node.token), make("small", {}, value)), placeOf(node));
    box.dataset.node = index;
    items.push(box);
    const [x, y] = placeOf(node), [u, v] = placeOf(node.parent === null ? { step: 0, place: 0 } : nodes[node.parent]);
    const [from, bend] = [u + STEP.box, (x - u - STEP.box) / 2];
    const path = svg("path", {
      d: `M${from},${v + STEP.middle} C${from + bend},${v + STEP.middle} ${x - bend},${y + STEP.middle} ${x},${y + STEP.middle}`,
      class: node.fate === "pruned" || node.fate === "displaced" ? "dead" : "",
    });
    path.dataset.node = index;
    drawing.append(path);
  });
  tree.replaceChildren(...items);
  choosePath();
}

/** Marks the path to a node, and says what the search did with it. */
function showPath(index) {
  const tree = byId("tree"), branch = byId("branch"), { nodes } = sentence.tree;
  for (const element of tree.querySelectorAll(".on")) element.classList.remove("on");
  branch.replaceChildren();
  const tokens = [];
  for (let at = index; at !== null && at >= 0; at = nodes[at].parent) {
    tokens.unshift(nodes[at].token);
    for (const element of tree.querySelectorAll(`[data-node="${at}"]`)) element.classList.add("on");
    const path = tree.querySelector(`path[data-node="${at}"]`);
    path.parentElement.append(path);  // above the others
  }
  if (index < 0) return;
  const { step, token, logProb, total, fate, score, rank } = nodes[index];
  const values = [`log-probability ${number(logProb, 4)} (probability ${number(Math.exp(logProb), 4)})`, `sum ${number(total, 4)}`];
  if (score !== null) values.push(`score ${number(score, 4)}`);
  branch.append(`Step ${step}: `, piece("bdi", token), ` ${values.join(", ")}. `);
  branch.append(rank === null ? `It was ${FATES[fate]}.` : `It is ${FATES[fate]} ${rank + 1}.`);
  const all = make("i", { dir: sentence.targetDirection });
  for (const each of tokens) all.append(piece("bdi", each), " ");
  branch.append(make("br"), all);
}

function choosePath() {
  byId("hypotheses").querySelectorAll("button").forEach((button, rank) => {
    button.setAttribute("aria-pressed", rank === view.output);
  });
  showPath(sentence.tree.nodes.findIndex((node) => node.rank === view.output));
}

/** Scrolls to the end of the chosen output's path. */
function showEnd() {
  const boxes = byId("tree").querySelectorAll("div.on"), scroll = byId("tree").parentElement;
  const end = Math.max(0, ...[...boxes].map((box) => box.offsetLeft + box.offsetWidth));
  if (end > scroll.scrollLeft + scroll.clientWidth || end < scroll.scrollLeft) scroll.scrollLeft = end - scroll.clientWidth + 8;
}

for (const [begins, ends] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  byId("tree").addEventListener(begins, (event) => {
    const box = event.target.closest("div[data-node]");
    if (box) showPath(Number(box.dataset.node));
  });
  byId("tree").addEventListener(ends, choosePath);
}

// --- the page

function show(index) {
  Object.assign(view, { sentence: index, output: 0 });
  sentence = data.sentences[index];
  byId("sentences").querySelectorAll("button").forEach((button, i) => button.toggleAttribute("aria-current", i === index));
  showSentence();
  showChoices();
  showOutputs();
  showTree();
  showWords();
}

byId("run").textContent = data.run;
byId("model").textContent = data.model;
byId("note").textContent = data.note;
document.querySelector(".scale i").style.background =
  `linear-gradient(to right, ${[...Array(11).keys()].map((n) => `rgb(${colour(n / 10)})`).join(", ")})`;
for (const each of data.sentences) {
  for (const [kind, array] of Object.entries(each.kinds)) each.kinds[kind] = decoded(array);
}
byId("sentences").hidden = data.sentences.length === 1;
byId("sentences").append(...data.sentences.map((each, i) => {
  const button = make("button", { type: "button", dir: "auto", title: each.text }, each.text);
  button.addEventListener("click", () => show(i));
  return button;
}));
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  if (view.kind) { showMatrix(); clear(); }
  drawAlignment();
});
show(0);
