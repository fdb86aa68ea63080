// Configuration, view of one run, difference to another configuration.

function runOf(id) {
  for (const row of data.rows) for (const run of row.runs) if (run.id === id) return { row, run };
  return null;
}

// Returns the folder of all runs, with its slash.
function commonFolder() {
  const ids = data.rows.flatMap((row) => row.runs.map((run) => run.id)), parts = ids[0].split("/").slice(0, -1);
  while (parts.length && !ids.every((id) => id.startsWith(`${parts.join("/")}/`))) parts.pop();
  return parts.map((part) => `${part}/`).join("");
}

// Returns the part of a package that a bad run needs, if there is one.
function urgentOf(run) {
  return run.sections.find((section) => section.urgent);
}

// Shows a configuration with its runs: the best one, or that of a run.
function renderConfiguration(row, current) {
  if (!setVisible("selected", Boolean(row) && (state.run === null || Boolean(current)))) return;
  const first = data.rows.filter((each) => each.cells.rank[1] === "1=").length;
  const best = first ? `One of ${first} configurations that are tied for #1` : "Best configuration";
  document.querySelector("#selected h2").textContent = current ? "Configuration" : best;
  const runs = row.runs.map((run) => html("tr", { class: "row", "aria-selected": String(run === current), onclick: (event) => { if (!event.target.closest("a, button")) location.hash = addressOf(run.id); } },
    html("td", {}, html("a", { href: addressOf(run.id), title: run.id }, run.id.slice(commonFolder().length))), html("td", { class: "number" }, run.seed),
    html("td", {}, html("span", { class: run.status === "failed" ? "bad" : "" }, run.status)),
    ...run.metrics.map((text) => html("td", { class: "number" }, text)), html("td", {}, copyButton(run.command || run.from, "Copy"))));
  const heads = [["run"], ["seed", "number"], ["status"], ...row.heads.map((name) => [name, "number"]), ["repeat"]];
  sectionBody("selected").replaceChildren(
    html("p", {}, IS_SINGLE ? "" : html("b", {}, `#${row.cells.rank[1]} `), row.label),
    factList(row.facts.filter(([name]) => row.tested.includes(name)), "test"), html("p", { class: "note" }, row.about), factList(row.facts.filter(([name]) => !row.tested.includes(name))),
    ...(current ? row.remarks : []).map((remark) => html("p", { class: "note" }, remark)), // else they are below the leaderboard
    row.command ? commandLine(row.command) : html("p", { class: "note" }, "The command is unknown. You can repeat each run from its folder."),
    scrollable(tableOf(heads, runs), "Runs of the configuration"));
}

function factList(facts, kind = "") {
  return facts.length ? html("dl", { class: `facts ${kind}` }, ...facts.map(([name, text]) => html("div", {}, html("dt", {}, name), html("dd", {}, text)))) : "";
}

// -- the view of one run

function renderRun(found, update) {
  setVisible("run", true);
  setVisible("difference", Boolean(found) && data.rows.length > 1);
  const back = IS_SINGLE ? "" : html("p", {}, html("a", { href: addressOf(null) || "#", id: "back" }, "← All configurations"));
  if (!found) return void sectionBody("run").replaceChildren(back, html("p", { class: "note" }, `This report has no run ${state.run}.`));
  const { row, run } = found, container = html("div", { class: "grid", id: "run-charts" });
  const draw = () => drawRunCharts(container, run);
  const failure = data.failed.find(([id]) => id === run.id);
  document.querySelector("#run h2").textContent = `Run ${run.id}`;
  sectionBody("run").replaceChildren(back,
    html("p", {}, html("b", { class: failure ? "bad" : "" }, run.status), failure ? `: ${failure[3]}` : ""),
    ...run.sections.map(packageSection), html("h3", {}, "Curves"),
    html("div", { class: "controls" }, ...axisControls(draw, update)), container, ...(run.test ? testParts(run.test) : []),
    html("h3", {}, "Repeat"), ...repeatCommands(run), html("h3", {}, "Config"), configTable(run),
    ...(run.log.length ? [html("h3", {}, "End of the log"), html("pre", { class: "scroll", tabindex: 0 }, run.log.join("\n"))] : []));
  draw();
  if (run.test) drawTest(run);
  renderDifference(row, run, update);
}

function packageSection(section) {
  const rows = section.rows.map((cells) => html("tr", {}, ...cells.map((cell, i) => html("td", { class: i < section.texts ? "" : "number" }, cell))));
  const heads = section.heads.map((head, i) => [head, i < section.texts ? "" : "number"]);
  return html("div", { class: section.urgent ? "urgent" : "" }, html("h3", {}, section.title), ...section.lines.map((line) => html("p", {}, line)),
    rows.length ? scrollable(tableOf(heads, rows), section.title) : null,
    section.command ? commandLine(section.command) : null);
}

function repeatCommands(run) {
  const commands = [[run.command, "With the current defaults of dlopt:"], [run.from, "With the saved config, even if defaults have changed since:"]];
  return commands.filter(([command]) => command).flatMap(([command, title]) => [html("p", { class: "note" }, title), commandLine(command)]);
}

// Returns the diagnostic of all layers: gradients/norm of gradients/norm/conv1.
function layersOf(tag) {
  return tag.slice(0, tag.lastIndexOf("/"));
}

function lineTitle(name, names) {
  return data.tags.includes(name) && names.length > 1 ? name.slice(name.lastIndexOf("/") + 1) : data.titles[name];
}

// Draws a chart for each metric, with its training and validation curves, and for each diagnostic, with its layers.
function drawRunCharts(container, run) {
  const families = new Map();
  for (const name of data.curves.filter((each) => run.curves[each])) {
    const family = data.tags.includes(name) ? layersOf(name) : name.replace(/^(train|val)_/, "");
    families.set(family, [...(families.get(family) || []), name]);
  }
  const charts = [...families].map(([family, names]) => ({ family, names, container: html("div", { class: "chart" }) }));
  container.replaceChildren(...charts.map(({ container: own, names }) => html("div", {}, own,
    html("div", { class: "legend" }, ...names.map((name, i) => html("span", { class: "swatch" }, swatch(styleOf(i)), lineTitle(name, names)))))));
  if (!charts.length) container.replaceChildren(html("p", { class: "note" }, "The run has no evaluated epoch."));
  for (const { family, names, container: own } of charts) {
    const lines = names.map((name, i) => ({ label: lineTitle(name, names), style: styleOf(i), points: smoothed(averageCurve([run], name, state.x, "none"), state.smooth) }));
    const [low, high] = extent(lines.flatMap((line) => line.points.map((p) => p[1])));
    const title = names.length > 1 ? family.replaceAll("_", " ") : data.titles[names[0]];
    drawChart(own, lines, { id: `run ${family}`, key: `${run.id} ${state.x} ${state.log}`, name: `${title} of ${run.id}`, nameX: AXES[state.x], nameY: title,
      logY: state.log || (low > 0 && high > 1000 * low), integers: state.x !== "seconds", height: 260, textY: (tick) => formatTick(names[0], tick), read: (p) => formatPoint(names[0], p) });
  }
}

function configTable(run) {
  const config = { ...data.config, ...run.config }, keys = Object.keys(config).sort();
  const rows = keys.map((key) => html("tr", {}, html("td", {}, key in run.config ? html("b", {}, key) : key), html("td", { class: "wrap" }, config[key])));
  return html("details", {}, html("summary", {}, `${keys.length} keys `, html("span", { class: "soft" }, IS_SINGLE ? "" : "bold: other runs differ")), scrollable(tableOf([["key"], ["value"]], rows), "Config"));
}

// -- difference of two configs

function renderDifference(row, run, update) {
  const others = Object.fromEntries(data.rows.filter((each) => each !== row).map((each) => [each.id, `#${each.cells.rank[1]} ${each.label}`]));
  if (!(state.compare in others)) state.compare = "";
  const found = runOf(state.compare), choice = html("div", { class: "controls" }, selectControl("compare", "with", { "": "choose a configuration", ...others }, update));
  sectionBody("difference").replaceChildren(choice, ...(found ? [differenceTable({ row, run }, found)] : []));
}

function differenceTable(...found) {
  const [a, b] = found.map(({ run }) => ({ ...data.config, ...run.config })), keys = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
  const facts = found.map(({ row }) => Object.fromEntries(row.facts)), names = Object.keys({ ...facts[0], ...facts[1] });
  const line = (name, x, y, kind) => html("tr", {}, html("td", {}, name), html("td", { class: kind }, x ?? "–"), html("td", { class: kind }, y ?? "–"));
  const rows = [...keys.filter((key) => a[key] !== b[key]).map((key) => line(key, a[key], b[key], "wrap")),
    ...names.map((name) => line(name, facts[0][name], facts[1][name], "number"))];
  return scrollable(tableOf([["key or metric"], ...found.map(({ row }) => [`#${row.cells.rank[1]} ${row.label}`])], rows), "Difference of two configurations");
}
