// Curves: means over runs with bands, smoothing. A point is [x, mean, low, high, count, raw mean if smoothed].

function curveOf(run, metric) {
  const found = run.curves[metric];
  return found && { ...run.x[found[0]], values: found[1] };
}

// Returns the mean over runs at every epoch that at least half of them reach, with a band. A position between two epochs
// of a run is interpolated. On an axis, epochs are apart by their mean distance over the runs: averaging at equal seconds
// would jump where a slower run begins or ends.
function averageCurve(runs, metric, axis, band) {
  const curves = runs.map((run) => curveOf(run, metric)).filter((curve) => curve && curve[axis]);
  const epochs = [...new Set(curves.flatMap((curve) => curve.epoch))].sort((a, b) => a - b);
  const values = curves.map((curve) => interpolated(epochs, curve.epoch, curve.values));
  const countAt = (i) => values.filter((each) => each[i] !== null).length;
  const kept = epochs.map((_, i) => i).filter((i) => 2 * countAt(i) >= curves.length);
  const positions = curves.map((curve) => interpolated(kept.map((i) => epochs[i]), curve.epoch, curve[axis]));
  const x = meanPositions(positions);
  return kept.map((i, k) => [x[k], ...meanWithBand(values.map((each) => each[i]).filter((value) => value !== null), band)]);
}

// Returns values at positions between those of a curve; null outside of it.
function interpolated(at, x, values) {
  let i = 0;
  return at.map((position) => {
    if (position < x[0] || position > x.at(-1)) return null;
    while (x[i] < position) i++;
    if (x[i] === position) return values[i];
    return values[i - 1] + ((position - x[i - 1]) / (x[i] - x[i - 1])) * (values[i] - values[i - 1]);
  });
}

function meanPositions(positions) {
  let sum = 0;
  return positions.length ? positions[0].map((_, i) => {
    const widths = positions.filter((each) => each[i] !== null && (!i || each[i - 1] !== null)).map((each) => each[i] - (i ? each[i - 1] : 0));
    sum += mean(widths);
    return sum;
  }) : [];
}

function meanWithBand(values, band) {
  const middle = mean(values), count = values.length;
  if (band === "range") return [middle, Math.min(...values), Math.max(...values), count];
  if (count < 2) return [middle, middle, middle, count];
  const spread = { std: 1, error: 1 / Math.sqrt(count), confidence: data.half_widths[count] }[band] ?? 0;
  const half = spread * deviation(values);
  return [middle, middle - half, middle + half, count];
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
}

// Returns the sample standard deviation; null for a single value.
function deviation(values) {
  const middle = mean(values);
  return values.length > 1 ? Math.hypot(...values.map((value) => value - middle)) / Math.sqrt(values.length - 1) : null;
}

// Returns exponential moving averages without the bias to the first value; weight 0: the points themselves.
function smoothed(points, weight) {
  if (!weight) return points;
  let sums = [0, 0, 0], norm = 0;
  return points.map(([x, middle, low, high, count]) => {
    norm = weight * norm + 1;
    sums = [middle, low, high].map((value, i) => weight * sums[i] + value);
    return [x, ...sums.map((sum) => sum / norm), count, middle];
  });
}
