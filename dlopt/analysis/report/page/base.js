// Elements, metrics as text, scales, state. Texts are only ever set as texts: the data are not trusted.
const data = JSON.parse(document.getElementById("data").textContent);
// Okabe & Ito 2008, without their yellow.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"];
const DASHES = ["", "7 3", "2 2", "8 3 2 3"];

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function body(section) {
  return document.querySelector(`#${section} .body`);
}

function show(section, visible) {
  document.getElementById(section).hidden = !visible;
  return visible;
}

// -- metrics

const NAMES = { lr: "learning rate", epoch: "epoch", step: "updates", seconds: "seconds" };

function title(name) {
  return NAMES[name] || name.replace(/^val_/, "validation ").replace(/^train_/, "training ").replaceAll("_", " ");
}

function digits(value, count = 4) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) {
    return value.toExponential(count - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(count)));
}

function isShare(name) {
  return name.includes("accuracy");
}

function figure(name, value) {
  if (value === null || value === undefined) return "–";
  if (isShare(name)) return `${(100 * value).toFixed(2)} %`;
  if (name === "seconds") return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value).toLocaleString("en")} s`;
  return name.endsWith("loss") ? value.toFixed(Math.abs(value) < 100 ? 4 : 1) : digits(value);
}

// [mean, deviation, count] as 95.9 ± 0.3 %
function statistic(name, found) {
  if (!found) return "–";
  const [mean, std] = found;
  if (!std) return figure(name, mean);
  if (isShare(name)) return `${(100 * mean).toFixed(2)} ± ${(100 * std).toFixed(2)} %`;
  if (name.endsWith("loss")) return `${figure(name, mean)} ± ${figure(name, std)}`;
  const unit = name === "seconds" ? " s" : "";
  return `${figure(name, mean).replace(unit, "")} ± ${digits(std, 2)}${unit}`;
}

// Differences of accuracies are in percentage points.
function signed(name, value) {
  return (value > 0 ? "+" : value < 0 ? "−" : "±") + figure(name, Math.abs(value)).replace(" %", "");
}

function value(found) {
  return typeof found === "number" ? digits(found) : found === undefined ? "–" : String(found);
}

// -- what the reader has chosen; it stands in the address, so that reloading keeps it

const state = { sort: ["rank", 1], off: {}, range: {}, drawn: null, hidden: [], chosen: null, metric: null, x: "epoch",
  band: null, log: false, target: data.target, all: false, open: null };

function restore() {
  try {
    const kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    for (const key of Object.keys(state)) if (key in kept) state[key] = kept[key];
  } catch (error) { /* nothing kept, or nothing that we wrote */ }
}

function keep() {
  try {
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
  } catch (error) { /* a page without an address of its own */ }
}

// -- scales and axes

function linear(low, high, from, to) {
  const scale = (x) => from + ((x - low) / (high - low || 1)) * (to - from);
  scale.invert = (place) => low + ((place - from) / (to - from)) * (high - low);
  scale.ticks = (count) => {
    const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  };
  return scale;
}

function logarithmic(low, high, from, to) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const scale = (x) => inner(Math.log10(x));
  scale.invert = (place) => 10 ** inner.invert(place);
  scale.ticks = (count) => {
    const decades = Math.log10(high / low), marks = decades < 1.5 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / count));
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every === 0) for (const mark of marks) found.push(Number((mark * 10 ** power).toPrecision(6)));
    }
    return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  };
  return scale;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const each of values) {
    if (each === null || !Number.isFinite(each)) continue;
    low = Math.min(low, each);
    high = Math.max(high, each);
  }
  return [low, high];
}

// -- the box that follows the pointer

const tip = document.getElementById("tip");

function tell(event, head, lines) {
  tip.replaceChildren(make("b", {}, head), ...lines.map(([mark, left, right]) => make("div", {}, mark, make("span", {}, left), make("span", {}, right))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const right = event.clientX + gap + box.width < innerWidth - 4;
  const x = right ? event.clientX + gap : Math.max(4, event.clientX - gap - box.width);
  const y = Math.min(Math.max(4, event.clientY + gap), Math.max(4, innerHeight - box.height - 4));
  tip.style.left = `${x}px`;
  tip.style.top = `${y}px`;
}

function hush() {
  tip.hidden = true;
}

function swatch(style, width = 26) {
  return draw("svg", { width, height: 10, "aria-hidden": "true" },
    draw("line", { x1: 1, x2: width - 1, y1: 5, y2: 5, stroke: style.colour, "stroke-width": 2.5, "stroke-dasharray": style.dash }));
}

function styleOf(i) {
  return { colour: COLOURS[i % COLOURS.length], dash: DASHES[i % DASHES.length] };
}
