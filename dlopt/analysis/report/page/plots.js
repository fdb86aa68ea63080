// What the keys do: sensitivity to the learning rate, importance, parallel coordinates, time to target.

function sensitivity() {
  if (!show("sensitivity", data.sensitivity.length > 0)) return;
  const place = make("div", { class: "chart", id: "sensitivity-chart" });
  const list = data.sensitivity.map((each, i) => ({ label: each.name, style: styleOf(i), marks: true,
    points: each.best.map(([lr, mean, std, count]) => [lr, mean, std === null ? mean : mean - std, std === null ? mean : mean + std, count]) }));
  const shared = isShare(data.by) ? "1 percentage point" : "5 %";
  body("sensitivity").replaceChildren(place,
    make("div", { class: "legend" }, ...list.map((each) => make("span", { class: "swatch" }, swatch(each.style), each.label))),
    make("ul", { class: "facts" }, ...data.sensitivity.map((each) => make("li", {}, `good for ${each.name}: `, make("b", {}, each.good[0] === each.good[1] ? digits(each.good[0]) : `${digits(each.good[0])} to ${digits(each.good[1])}`)))),
    make("p", { class: "note" }, `The best configuration at each learning rate, others as small dots; band: ± standard deviation over seeds. Good (bars below the curves): next to the best and at most ${shared} worse, or one standard deviation over seeds where that is more. × marks rates at which runs failed. Filters do not apply here.`));
  const height = (place.clientWidth < 500 ? 260 : 340) + 14 * list.length;
  chart(place, list, { name: "figure against learning rate by optimizer", nameX: "learning rate", nameY: title(data.by), logX: true, height,
    textY: (tick) => (isShare(data.by) ? `${digits(100 * tick)} %` : digits(tick)), read: (p) => statistic(data.by, [p[1], p[3] > p[2] ? p[3] - p[1] : null]),
    extra: (root, x, y, o) => {
      const bottom = o.height - o.margin.bottom;
      data.sensitivity.forEach((each, i) => {
        const colour = styleOf(i).colour, line = bottom - 6 - 9 * (data.sensitivity.length - 1 - i);
        root.append(draw("line", { class: "good", x1: x(each.good[0]) - 5, x2: x(each.good[1]) + 5, y1: line, y2: line, stroke: colour, "stroke-width": 6, "stroke-linecap": "round" }));
        for (const [lr, mean] of each.points) root.append(draw("circle", { cx: x(lr), cy: y(mean), r: 2, fill: colour, opacity: 0.5 }));
        for (const lr of each.failed.filter((rate) => x(rate) <= o.width - o.margin.right + 1)) {
          const mark = draw("text", { x: x(lr), y: line - 8, "text-anchor": "middle", "font-weight": 700 }, "×");
          mark.style.fill = colour;
          root.append(mark);
        }
      });
    } });
}

function importance() {
  const found = data.importance;
  if (!show("importance", Boolean(found))) return;
  if (found.missing) return body("importance").replaceChildren(make("p", { class: "note" }, found.missing));
  const place = make("div", { class: "chart", id: "importance-chart" });
  body("importance").replaceChildren(place, make("p", { class: "note" },
    `Fraction of the variance of ${title(data.by)} over ${found.configurations} configurations that a key explains alone, by functional ANOVA; ` +
    "interactions of keys explain the rest. Filters do not apply here."));
  const keys = [...found.keys].sort((a, b) => b[1] - a[1]);
  const width = Math.max(280, place.clientWidth), step = 26, left = Math.min(width * 0.42, 16 + 7.2 * Math.max(...keys.map(([key]) => key.length)));
  const x = linear(0, 1, left, width - 50);
  const root = draw("svg", { viewBox: `0 0 ${width} ${keys.length * step + 30}`, height: keys.length * step + 30, role: "img", "aria-label": "importance of the keys" });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) root.append(draw("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: keys.length * step }),
    draw("text", { x: x(tick), y: keys.length * step + 16, "text-anchor": "middle" }, `${100 * tick} %`));
  keys.forEach(([key, alone], i) => {
    const read = (event) => tell(event, key, [["", "alone", `${(100 * alone).toFixed(1)} %`]]);
    root.append(draw("g", { onpointermove: read, onpointerleave: hush },
      draw("rect", { x: 0, y: i * step, width, height: step, fill: "#fff", opacity: 0 }),
      draw("rect", { x: left, y: i * step + 4, width: x(alone) - left, height: step - 8, fill: COLOURS[0] }),
      draw("text", { x: left - 6, y: i * step + 17, "text-anchor": "end" }, key)));
  });
  place.replaceChildren(root);
}

// -- parallel coordinates

const brushes = {}; // axis -> [low, high] in 0..1

function axisOf(name, values) {
  const known = values.filter((each) => each !== undefined && each !== null);
  const [low, high] = extent(known.map((each) => (typeof each === "number" ? each : NaN)));
  if (known.every((each) => typeof each === "number") && low < high) {
    const scale = (low > 0 && high / low >= 20 ? logarithmic : linear)(low, high, 0, 1);
    const distinct = [...new Set(known)].sort((a, b) => a - b);
    const ticks = distinct.length <= 8 ? distinct : [0, 0.25, 0.5, 0.75, 1].map((place) => scale.invert(place));
    return { name, place: (each) => (each === undefined || each === null ? null : scale(each)), ticks: ticks.map((tick) => [scale(tick), isShare(name) ? figure(name, tick) : digits(tick)]) };
  }
  const names = [...new Set(values.map(value))].sort();
  const places = new Map(names.map((each, i) => [each, (i + 0.5) / names.length]));
  return { name, place: (each) => places.get(value(each)), ticks: names.length > 20 ? [] : [...places].map(([each, place]) => [place, each]) };
}

function shade(share) { // light grey to dark blue: the darker the better, in print too
  const stops = [[217, 217, 217], [120, 170, 214], [8, 48, 107]], i = share < 0.5 ? 0 : 1, part = (share - i / 2) * 2;
  return `rgb(${stops[i].map((each, k) => Math.round(each + part * (stops[i + 1][k] - each))).join(",")})`;
}

function parallel() {
  const rows = visible.filter((row) => row.metrics[data.by]);
  if (!show("parallel", data.keys.length > 1 && data.rows.filter((row) => row.metrics[data.by]).length > 1)) return;
  const place = make("div", { class: "chart", id: "parallel-chart" });
  body("parallel").replaceChildren(place, make("p", { class: "note" }, `A line per configuration, the darker the better by ${title(data.by)}. Drag along an axis to keep the lines that cross there; a click on it lets go.`));
  const list = [...data.keys.slice(0, 9).map((key) => axisOf(key, rows.map((row) => row.values[key]))), axisOf(data.by, rows.map((row) => row.metrics[data.by][0]))];
  const full = Math.max(280, place.clientWidth), width = Math.max(full, 118 * list.length), height = 330, top = 34, bottom = height - 14;
  const x = (i) => 14 + (i * (width - 100)) / (list.length - 1), y = (share) => bottom - share * (bottom - top);
  const root = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, width, role: "img", "aria-label": "parallel coordinates" });
  const lines = rows.map((row, i) => {
    const places = list.map((axis, k) => axis.place(k < list.length - 1 ? row.values[axis.name] : row.metrics[data.by][0]));
    const points = places.map((each, k) => (each === null ? null : `${x(k).toFixed(1)} ${y(each).toFixed(1)}`)).filter(Boolean);
    return { row, places, colour: shade(1 - i / Math.max(rows.length - 1, 1)), path: draw("path", { d: `M${points.join("L")}`, fill: "none" }) };
  });
  const paint = () => {
    for (const line of lines) {
      const kept = list.every((axis, k) => !brushes[axis.name] || (line.places[k] !== null && line.places[k] >= brushes[axis.name][0] && line.places[k] <= brushes[axis.name][1]));
      fill(line.path, { stroke: kept ? line.colour : "#ededed", "stroke-width": kept && line.row === chosenRow() ? 3 : 1.3, class: kept ? "kept" : "" }, []);
    }
  };
  for (const line of [...lines].reverse()) {
    line.path.addEventListener("pointermove", (event) => {
      line.path.setAttribute("stroke-width", 3.5);
      tell(event, `#${line.row.rank} ${line.row.label}`, [["", title(data.by), statistic(data.by, line.row.metrics[data.by])]]);
    });
    line.path.addEventListener("pointerleave", () => { paint(); hush(); });
    line.path.addEventListener("click", () => { state.chosen = line.row.id; render(); });
    root.append(line.path);
  }
  list.forEach((axis, k) => root.append(parallelAxis(axis, x(k), y, paint, k === 0 ? "start" : "middle")));
  paint();
  place.replaceChildren(make("div", width > full ? { class: "scroll" } : {}, root));
  if (width > full) root.style.width = `${width}px`;
}

function parallelAxis(axis, x, y, paint, anchor) {
  const mark = draw("rect", { x: x - 5, width: 10, fill: COLOURS[1], opacity: 0.3, visibility: "hidden" });
  const showBrush = () => {
    const range = brushes[axis.name];
    fill(mark, range ? { y: y(range[1]), height: y(range[0]) - y(range[1]), visibility: "visible" } : { visibility: "hidden" }, []);
  };
  const handle = draw("rect", { x: x - 12, width: 24, y: y(1) - 6, height: y(0) - y(1) + 12, fill: "#fff", opacity: 0, "data-axis": axis.name });
  const share = (event) => {
    const box = handle.getBoundingClientRect();
    return 1 - (event.clientY - box.top - 6) / (box.height - 12);
  };
  let start = null;
  handle.addEventListener("pointerdown", (event) => { start = share(event); handle.setPointerCapture(event.pointerId); });
  handle.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const end = share(event);
    brushes[axis.name] = [Math.min(start, end), Math.max(start, end)];
    showBrush();
    paint();
  });
  handle.addEventListener("pointerup", (event) => {
    if (start !== null && Math.abs(share(event) - start) < 0.01) delete brushes[axis.name];
    start = null;
    showBrush();
    paint();
  });
  showBrush();
  handle.style.cursor = "row-resize";
  const labels = axis.ticks.map(([place, text]) => draw("text", { x: x + 7, y: y(place) + 4, stroke: "#fff", "stroke-width": 3, "paint-order": "stroke", "pointer-events": "none" }, text));
  const name = title(axis.name), whole = data.short[axis.name] || name, short = whole.length > 20 ? `${whole.slice(0, 19)}…` : whole;
  return draw("g", {}, draw("line", { class: "axis", x1: x, x2: x, y1: y(1), y2: y(0) }), mark, ...labels, handle,
    draw("text", { x: anchor === "start" ? x - 12 : x, y: 14, "text-anchor": anchor, "font-weight": 600 }, draw("title", {}, name), short));
}

// -- time to target

function reach(run, target) {
  const values = run.curve[data.by] || [];
  const i = values.findIndex((each) => each !== null && (data.lower ? each <= target : each >= target));
  return i < 0 ? null : { step: run.curve.step[i], seconds: run.curve.seconds[i] };
}

function moments(values) {
  const known = values.filter((each) => each !== null && each !== undefined), n = known.length;
  if (!n) return null;
  const mean = known.reduce((a, b) => a + b, 0) / n;
  return [mean, n > 1 ? Math.sqrt(known.reduce((sum, each) => sum + (each - mean) ** 2, 0) / (n - 1)) : null, n];
}

function times(update) {
  if (!show("times", state.target !== null && data.curves.includes(data.by))) return;
  const share = isShare(data.by), factor = share ? 100 : 1;
  const rows = visible.map((row) => {
    const met = row.runs.map((run) => reach(run, state.target)).filter(Boolean);
    return { row, count: met.length, step: moments(met.map((each) => each.step)), seconds: moments(met.map((each) => each.seconds)) };
  });
  rows.sort((a, b) => !a.step - !b.step || (a.count < a.row.runs.length) - (b.count < b.row.runs.length) || (a.step ? a.step[0] - b.step[0] : 0) || a.row.rank - b.row.rank);
  const input = make("input", { type: "number", id: "target", step: "any", value: Number((factor * state.target).toPrecision(6)),
    onchange: () => { if (input.value !== "") { state.target = Number(input.value) / factor; update(); } } });
  const reached = rows.filter((each) => each.count), longest = { step: Math.max(...reached.map((each) => each.step[0])), seconds: Math.max(...reached.map((each) => (each.seconds ? each.seconds[0] : 0))) };
  const bar = (found, name, colour) => make("td", { class: "number" }, !found ? "–" : make("span", { class: "swatch" }, statistic(name === "step" ? "steps" : name, found),
    draw("svg", { width: 90, height: 12, "aria-hidden": "true" }, draw("rect", { y: 1, width: Math.max(1, (88 * found[0]) / longest[name]), height: 10, fill: colour }))));
  const lines = rows.slice(0, state.all ? rows.length : 20).map((each) => make("tr", {},
    make("td", { class: "number" }, String(each.row.rank)), make("td", { class: "wrap" }, each.row.label), make("td", { class: "number" }, `${each.count} of ${each.row.runs.length}`),
    bar(each.step, "step", COLOURS[0]), bar(each.seconds, "seconds", COLOURS[1])));
  body("times").replaceChildren(
    make("div", { class: "controls" }, make("label", {}, `${title(data.by)} ${data.lower ? "at most" : "at least"} `, input, share ? " %" : "")),
    make("p", { class: "note" }, `${reached.length} of ${rows.length} configurations reach it. Means ± standard deviations over the runs that do, at the first evaluated epoch that is as good; configurations of which some runs do not reach it stand behind the others.`),
    make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...["#", "configuration", "runs that reach it", "updates", "seconds"].map((name, i) => make("th", { class: i === 1 ? "" : "number", scope: "col" }, name)))), make("tbody", {}, ...lines))));
}
