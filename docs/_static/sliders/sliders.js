// Draws the precomputed paths of paths.js (docs/sliders.py); nothing is trained or loaded here.
"use strict";

const byId = (id) => document.getElementById(id);
const lists = { rate: DATA.rates, momentum: DATA.momenta, condition: DATA.conditions };
const names = Object.keys(lists);

function pathOf(condition, momentum, rate) {
  const flat = DATA.paths[(condition * DATA.momenta.length + momentum) * DATA.rates.length + rate];
  return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
}

const diverges = (points) => points.length <= DATA.updates || relative(points).at(-1) > 1;

function relative(points) {
  const first = Math.hypot(...points[0]);
  return points.map((point) => Math.hypot(...point) / first);
}

// The first update after which the distance stays within the tolerance; null if there is none.
function reached(points) {
  if (points.length <= DATA.updates) return null;
  const last = relative(points).findLastIndex((each) => each > DATA.tolerance);
  return last === points.length - 1 ? null : last + 1;
}

function element(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

const line = (points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

function drawPlane(condition, points, plain) {
  const svg = byId("plane");
  svg.replaceChildren();
  const [left, right, bottom, top] = DATA.window;
  const box = { x: 50, y: 10, width: 640, height: 400 };
  const at = ([x, y]) => [
    box.x + ((x - left) / (right - left)) * box.width,
    box.y + ((top - y) / (top - bottom)) * box.height,
  ];
  const clip = element(element(svg, "clipPath", { id: "inside" }), "rect", box);
  const inside = element(svg, "g", { "clip-path": "url(#inside)" });
  const [zeroX, zeroY] = at([0, 0]);
  const unitX = box.width / (right - left), unitY = box.height / (top - bottom);
  for (let level = 0.02; level < 400; level *= 2.2) { // contours of the loss
    const [a, b] = [Math.sqrt(2 * level) * unitX, Math.sqrt((2 * level) / condition) * unitY];
    element(inside, "ellipse", { cx: zeroX, cy: zeroY, rx: a, ry: b, class: "ellipse" });
  }
  element(svg, "rect", { ...box, class: "axis", fill: "none" });
  for (let x = Math.ceil(left); x <= right; x++)
    element(svg, "text", { x: at([x, 0])[0], y: box.y + box.height + 22, "text-anchor": "middle" }, String(x).replace("-", "−"));
  for (let y = Math.ceil(bottom); y <= top; y++)
    element(svg, "text", { x: box.x - 8, y: at([0, y])[1] + 5, "text-anchor": "end" }, String(y).replace("-", "−"));
  element(svg, "text", { x: box.x + box.width / 2, y: 460, "text-anchor": "middle" }, "x");
  element(svg, "text", { x: 10, y: box.y + box.height / 2 - 20 }, "y");
  if (plain) {
    element(inside, "polyline", { points: line(plain.map(at)), class: "plain" });
    for (const [cx, cy] of plain.map(at)) element(inside, "circle", { cx, cy, r: 4, class: "plain-dot" });
  }
  element(inside, "polyline", { points: line(points.map(at)), class: "path" });
  for (const [cx, cy] of points.map(at)) element(inside, "circle", { cx, cy, r: 4, class: "dot" });
  for (const [dx, dy] of [[9, 0], [0, 9]])
    element(inside, "line", { x1: zeroX - dx, x2: zeroX + dx, y1: zeroY - dy, y2: zeroY + dy, class: "target" });
  const [startX, startY] = at(points[0]);
  element(inside, "text", { x: startX - 8, y: startY - 14, "text-anchor": "middle" }, "start");
  element(inside, "text", { x: zeroX + 14, y: zeroY - 14 }, "minimum");
}

function drawDistance(points, plain) {
  const svg = byId("distance");
  svg.replaceChildren();
  const box = { x: 66, y: 10, width: 400, height: 400 };
  const [low, high] = [-5, 1]; // powers of ten
  const at = (update, value) => [
    box.x + (update / DATA.updates) * box.width,
    box.y + ((high - Math.log10(Math.max(value, 10 ** low))) / (high - low)) * box.height,
  ];
  element(element(svg, "clipPath", { id: "box" }), "rect", box);
  for (let power = low; power <= high; power++) {
    const [, y] = at(0, 10 ** power);
    element(svg, "line", { x1: box.x, x2: box.x + box.width, y1: y, y2: y, class: "gridline" });
    const label = element(svg, "text", { x: box.x - 8, y: y + 5, "text-anchor": "end" }, "10");
    element(label, "tspan", { dy: -6, "font-size": "75%" }, String(power).replace("-", "−"));
  }
  const [, goal] = at(0, DATA.tolerance);
  element(svg, "line", { x1: box.x, x2: box.x + box.width, y1: goal, y2: goal, class: "axis", "stroke-dasharray": "2 4" });
  element(svg, "rect", { ...box, class: "axis", fill: "none" });
  for (let update = 0; update <= DATA.updates; update += 20)
    element(svg, "text", { x: at(update, 1)[0], y: box.y + box.height + 22, "text-anchor": "middle" }, update);
  element(svg, "text", { x: box.x + box.width / 2, y: 460, "text-anchor": "middle" }, "updates (distance 1 at the start)");
  const inside = element(svg, "g", { "clip-path": "url(#box)" });
  const curves = plain ? [[plain, "plain"], [points, "path"]] : [[points, "path"]];
  for (const [curve, style] of curves)
    element(inside, "polyline", { points: line(relative(curve).map((each, i) => at(i, each))), class: style });
  element(svg, "text", { x: box.x + 10, y: box.y + box.height - 36, class: "momentum-label" }, plain ? "solid: with momentum" : "without momentum");
  if (plain) element(svg, "text", { x: box.x + 10, y: box.y + box.height - 14, class: "plain-label" }, "dashed: without");
}

function outcome(points) {
  const update = reached(points);
  if (update !== null) return `within a thousandth of the initial distance after ${update} updates`;
  if (diverges(points)) return "diverges";
  return `at ${relative(points).at(-1).toPrecision(2)} of the initial distance after ${DATA.updates} updates`;
}

function show() {
  const chosen = Object.fromEntries(names.map((name) => [name, Number(byId(name).value)]));
  const value = Object.fromEntries(names.map((name) => [name, lists[name][chosen[name]]]));
  for (const name of names) {
    byId(`${name}-value`).textContent = value[name];
    byId(name).setAttribute("aria-valuetext", value[name]);
  }
  const points = pathOf(chosen.condition, chosen.momentum, chosen.rate);
  const plain = chosen.momentum > 0 ? pathOf(chosen.condition, 0, chosen.rate) : null;
  drawPlane(value.condition, points, plain);
  drawDistance(points, plain);
  const bound = (2 * (1 + value.momentum)) / value.condition;
  const other = plain ? ` Without momentum: ${outcome(plain)}.` : "";
  byId("result").textContent = `${value.momentum > 0 ? `With momentum ${value.momentum}` : "Without momentum"}: ` +
    `${outcome(points)}.${other} Learning rates below 2 (1 + momentum) / condition number = ` +
    `${Number(bound.toPrecision(2))} converge.`;
}

// Chooses the momentum and the rate with the smallest distance at the end, or that are the first to be near.
function chooseBest() {
  const condition = Number(byId("condition").value);
  let best = [Infinity, Infinity];
  for (const momentum of DATA.momenta.keys())
    for (const rate of DATA.rates.keys()) {
      const points = pathOf(condition, momentum, rate);
      if (points.length <= DATA.updates) continue;
      const score = [reached(points) ?? Infinity, relative(points).at(-1)];
      if (score[0] < best[0] || (score[0] === best[0] && score[1] < best[1])) {
        best = score;
        [byId("momentum").value, byId("rate").value] = [momentum, rate];
      }
    }
  show();
}

for (const name of names) {
  byId(name).max = lists[name].length - 1;
  byId(name).addEventListener("input", show);
}
byId("rate").value = DATA.rates.indexOf(0.018);
byId("momentum").value = DATA.momenta.indexOf(0.8);
byId("condition").value = DATA.conditions.indexOf(100);
byId("best").addEventListener("click", chooseBest);
show();
