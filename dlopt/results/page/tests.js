// The test of a run: confusion matrix, ROC, precision over recall, calibration, predictions, the most wrong samples.

const SHEET = { columns: 6, side: 64 }; // of the image that contains all samples

function testParts(test) {
  const used = { matrix: test.confusion, roc: test.roc, precision: test.precision_recall, calibration: test.calibration, values: test.predicted };
  const charts = Object.entries(used).filter(([, values]) => values.length).map(([name]) => html("div", {}, html("div", { class: "chart", id: `test-${name}` })));
  return [html("h3", {}, "Evaluation"), html("p", { class: "note" }, `${test.samples.toLocaleString("en")} samples of the split: ${test.split}`),
    html("div", { class: "grid" }, ...charts), ...mostWrong(test)];
}

// Draws into the elements of the parts, which have a width once they are on the page.
function drawTest({ id, test }) {
  const chart = (name, lines, options) => {
    const container = document.getElementById(name);
    if (!container) return;
    drawChart(container, lines, { id: name, key: id, textY: formatNumber, read: (p) => formatNumber(p[1]), height: 300, ...options });
    container.after(html("div", { class: "legend" }, ...lines.map((line) => html("span", { class: "swatch" }, swatch(line.style), line.label))));
  };
  const linesOfCurves = (curves, area) => curves.map((curve, i) => ({ label: `${curve.name} (${area} ${curve.area.toFixed(4)})`, style: styleOf(i),
    points: curve.points.map(([x, y]) => [x, y, y, y, 1]) }));
  const equal = (label, low, high) => ({ label, style: styleOf(4, 2), points: Array.from({ length: 11 }, (_, i) => low + (i / 10) * (high - low)).map((x) => [x, x, x, x, 0]) });
  if (test.confusion.length) drawMatrix(test);
  chart("test-roc", linesOfCurves(test.roc, "AUC"), { name: "ROC", nameX: "false positive rate", nameY: "true positive rate (recall)" });
  chart("test-precision", linesOfCurves(test.precision_recall, "AP"), { name: "precision over recall", nameX: "recall", nameY: "precision" });
  const bins = test.calibration.map(([x, y, count]) => [x, y, y, y, count]);
  chart("test-calibration", [{ label: "calibration", style: styleOf(0), points: bins, marks: true }, equal("calibrated", 0, 1)], { name: "calibration",
    nameX: "confidence", nameY: "accuracy", read: (p) => `${formatNumber(p[1])}${p[4] ? ` of ${p[4].toLocaleString("en")} samples` : ""}` });
  const [low, high] = extent(test.predicted.flat()), margin = 0.03 * (high - low);
  chart("test-values", [equal("prediction = target", low - margin, high + margin)], { name: "predictions", nameX: "target", nameY: "prediction",
    extra: (x, y) => test.predicted.map(([target, value]) => svg("circle", { cx: x(target), cy: y(value), r: 2.5, fill: "var(--c0)", "fill-opacity": 0.5 })) });
}

function drawMatrix({ classes, confusion }) {
  const container = document.getElementById("test-matrix");
  const sums = confusion.map((row) => row.reduce((sum, count) => sum + count, 0)), longest = Math.max(...classes.map((name) => shortened(name).length));
  const left = 36 + 7 * longest, available = Math.max(280, container.clientWidth) - left - 8;
  const size = Math.min(Math.max(available / classes.length, 9), 60), isSmall = size < 34, isTurned = 7 * longest > size;
  const width = left + size * classes.length + 8, bottom = 8 + size * classes.length, height = bottom + (isTurned ? 7 * longest : 14) + 30;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "confusion matrix" });
  const middle = (i) => left + size * (i + 0.5);
  confusion.forEach((row, i) => row.forEach((count, j) => root.append(matrixCell({ count, share: sums[i] ? count / sums[i] : 0, isSmall, size,
    x: left + size * j, y: 8 + size * i, title: `true ${classes[i]}, predicted ${classes[j]}` }))));
  root.append(...classes.filter(() => size >= 12).flatMap((name, i) => [label(left - 6, 8 + size * (i + 0.5) + 4, shortened(name), "end"),
    isTurned ? svg("text", { transform: `translate(${middle(i) + 4} ${bottom + 6}) rotate(-90)`, "text-anchor": "end" }, shortened(name)) : label(middle(i), bottom + 16, name)]),
    label(left + (size * classes.length) / 2, height - 8, "predicted class"),
    svg("text", { transform: `translate(14 ${8 + (size * classes.length) / 2}) rotate(-90)`, "text-anchor": "middle" }, "true class"));
  const table = () => [["true \\ predicted", ...classes], ...confusion.map((row, i) => [classes[i], ...row])];
  container.replaceChildren(html("div", { class: "overflow" }, root), exportButtons("confusion matrix", root, table));
}

function matrixCell({ count, share, isSmall, size, x, y, title }) {
  const percent = `${(100 * share).toFixed(0)} %`, fill = share > 0.5 ? "var(--paper)" : "var(--ink)";
  const line = (text, shift) => svg("text", { x: x + size / 2, y: y + size / 2 + shift, "text-anchor": "middle", fill, "pointer-events": "none" }, text);
  return svg("g", { onpointerleave: hideTooltip, onpointermove: (event) => showTooltip(event.clientX, event.clientY, title,
    [["", "samples", count.toLocaleString("en")], ["", "of the true class", `${(100 * share).toFixed(1)} %`]]) },
    svg("rect", { x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1, fill: "var(--strong)", "fill-opacity": 0.04 + 0.92 * share }),
    ...(isSmall || !count ? [] : [line(count.toLocaleString("en"), -2), line(percent, 12)]));
}

function mostWrong({ most_wrong: samples, sheet, wrong, classes }) {
  if (!samples.length) return [];
  const title = classes.length ? `The ${samples.length} most wrong of ${wrong.toLocaleString("en")} wrong samples` : `The ${samples.length} largest errors`;
  const shareOf = (share) => (share === null ? "" : ` ${(100 * share).toFixed(1)} %`);
  const heads = [["position", "number"], ["source"], ["truth"], ["prediction"], ["label"], ["probability", "number"]];
  const used = heads.map((_, i) => samples.some((sample) => sample[i] !== "" && sample[i] !== null)), kept = (_, i) => used[i];
  const rows = samples.map((sample) => html("tr", {}, ...[...sample.slice(0, 5), shareOf(sample[5])].map((text, i) => html("td", { class: heads[i][1] || null }, text)).filter(kept)));
  const pictures = samples.map(([position, source, truth, prediction, name, share], i) => html("figure", { title: source || `position ${position}` },
    thumbnail(sheet, i, samples.length), html("figcaption", {}, truth || "none", html("span", {}, `${name || prediction || "none"}${shareOf(share)}`))));
  return [html("h3", {}, title), html("p", { class: "note" }, `This page contains ${samples.length} sample${samples.length > 1 ? "s" : ""} of the data. ${sheet ? "Below each, the truth and the prediction." : ""}`),
    sheet ? html("div", { class: "samples" }, ...pictures) : scrollable(tableOf(heads.filter(kept), rows), title)];
}

function thumbnail(sheet, i, count) {
  const { columns, side } = SHEET, x = side * (i % columns), y = side * Math.floor(i / columns);
  return svg("svg", { viewBox: `${x} ${y} ${side} ${side}`, width: 96, height: 96, role: "img", "aria-label": "sample" },
    svg("image", { href: sheet, width: columns * side, height: side * Math.ceil(count / columns) }));
}
