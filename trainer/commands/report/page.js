"use strict";
// Draws what the element `data` holds: curves by configuration, the last values of clients, and heat maps of clients.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
const DASHES = [["solid", "solid"], ["dash", "dashed"], ["dot", "dotted"]]; // as Plotly and as CSS name them
const CONFIG = { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtonsToRemove: ["sendChartToCloud"] };
const FONT = { family: "system-ui, sans-serif", size: 13 };
const element = (id) => document.getElementById(id);
const colour = (index) => COLOURS[index % COLOURS.length];
const dash = (index) => DASHES[Math.floor(index / COLOURS.length) % DASHES.length];
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

// Settings go to a new line where a label would be too long for a legend.
function wrapped(label) {
  const lines = [""];
  for (const part of label.split(", ")) {
    const line = lines.at(-1);
    if (line && line.length + part.length > 40) lines.push(part);
    else lines[lines.length - 1] = line ? `${line}, ${part}` : part;
  }
  return lines.map(escaped).join(",<br>");
}

function option(select, value, text) {
  select.add(new Option(text, value));
}

// The points of one line, without the rounds in which the metric was not measured.
function points(curves, name, axis) {
  const figure = curves.figures[name];
  const kept = figure.mean.flatMap((value, index) => (value === null ? [] : [index]));
  return {
    x: kept.map((index) => curves.x[axis][index]),
    y: kept.map((index) => figure.mean[index]),
    deviation: kept.map((index) => figure.deviation[index] ?? 0),
    runs: kept.map((index) => figure.runs[index]),
  };
}

function band(line, index, place) {
  const upper = line.y.map((value, at) => value + line.deviation[at]);
  const lower = line.y.map((value, at) => value - line.deviation[at]);
  return {
    ...place, legendgroup: `${index}`, showlegend: false, hoverinfo: "skip", mode: "lines", line: { width: 0 },
    x: [...line.x, ...line.x.toReversed()], y: [...upper, ...lower.toReversed()],
    fill: "toself", fillcolor: `${colour(index)}2e`,
  };
}

function curveTraces(names, axis, kind) {
  const bands = [], lines = [], inLegend = new Set();
  names.forEach((name, plot) => {
    const place = { xaxis: `x${plot + 1}`, yaxis: `y${plot + 1}` };
    data.configurations.forEach(({ label, [kind]: curves }, index) => {
      if (!(name in curves.figures)) return;
      const line = points(curves, name, axis);
      if (line.deviation.some((value) => value > 0)) bands.push(band(line, index, place));
      lines.push({
        ...place, x: line.x, y: line.y, name: wrapped(label), legendgroup: `${index}`, showlegend: !inLegend.has(index),
        mode: line.x.length > 40 ? "lines" : "lines+markers", marker: { size: 4 },
        line: { color: colour(index), dash: dash(index)[0], width: 2 }, legendrank: index,
        customdata: line.x.map((_, at) => [line.deviation[at], line.runs[at]]),
        hovertemplate: "%{y:.5g} ± %{customdata[0]:.2g} (runs: %{customdata[1]}) at %{x}",
      });
      inLegend.add(index);
    });
  });
  return [...bands, ...lines];
}

function drawCurves() {
  drawLines("curves", element("all").checked ? data.names : data.names.slice(0, 4), element("axis").value);
}

// The lines of all configurations, of their curves by round or by step.
function drawLines(kind, names, axis) {
  const columns = names.length > 1 && window.innerWidth > 800 ? 2 : 1;
  const rows = Math.ceil(names.length / columns);
  const layout = {
    font: FONT, height: 340 * rows + 60, margin: { t: 20, r: 20 }, hovermode: "closest",
    grid: { rows, columns, pattern: "independent", xgap: 0.15, ygap: 0.25 },
    legend: { tracegroupgap: 2, font: { size: 12 }, itemwidth: 40 },
  };
  names.forEach((name, plot) => {
    layout[`xaxis${plot + 1}`] = { title: { text: data.axes[axis] }, zeroline: false };
    layout[`yaxis${plot + 1}`] = { title: { text: name }, zeroline: false };
  });
  Plotly.react(kind, curveTraces(names, axis, kind), layout, CONFIG);
}

function drawClients() {
  const name = element("figure").value;
  const drawn = data.configurations.flatMap(({ label, clients }, index) =>
    name in clients ? [{ label, clients: clients[name], index }] : []);
  const traces = drawn.map(({ label, clients, index }) => ({
    type: "box", orientation: "h", boxpoints: "all", jitter: 0.5, pointpos: 0, name: wrapped(label),
    x: clients.values, text: clients.names, hovertemplate: "%{text}: %{x:.4g}",
    marker: { color: colour(index), size: 5, opacity: 0.6 }, line: { width: 1 }, fillcolor: "rgba(0,0,0,0)",
  }));
  Plotly.react("clients", traces, {
    font: FONT, height: 90 + 60 * traces.length, margin: { t: 10, r: 20 }, showlegend: false,
    xaxis: { title: { text: name }, zeroline: false }, yaxis: { automargin: true, autorange: "reversed" },
  }, CONFIG);
}

function drawHeatMap() {
  const name = element("figure").value;
  const figure = data.heatMaps[element("run").value].figures[name];
  const trace = figure && {
    type: "heatmap", x: figure.rounds, y: figure.clients, z: figure.values, colorscale: "Viridis",
    reversescale: figure.best === "low", colorbar: { title: { text: name } },
    hovertemplate: "client %{y}, round %{x}: %{z:.4g}<extra></extra>",
  };
  const height = figure ? Math.min(700, 140 + 16 * Math.max(8, figure.clients.length)) : 140;
  Plotly.react("heat-map", trace ? [trace] : [], {
    font: FONT, height, margin: { t: 10, r: 20 }, xaxis: { title: { text: "round" } }, yaxis: { title: { text: "client" } },
  }, CONFIG);
}

function sortBy(heading) {
  const table = heading.closest("table"), place = heading.cellIndex, body = table.tBodies[0];
  const upward = heading.ariaSort !== "ascending";
  const key = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
  const compare = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
  const numeric = (a, b) => Number(key(a)) - Number(key(b));
  const rows = [...body.rows];
  const isNumber = rows.every((row) => key(row) !== "" && !Number.isNaN(Number(key(row))));
  rows.sort(isNumber ? numeric : compare);
  for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
  heading.ariaSort = upward ? "ascending" : "descending";
  body.append(...(upward ? rows : rows.reverse()));
}

for (const heading of document.querySelectorAll("th")) heading.onclick = () => sortBy(heading);
[...element("configurations").tBodies[0].rows].forEach((row, index) => {
  row.cells[0].innerHTML = `<span class="swatch" style="border-color:${colour(index)};border-top-style:${dash(index)[1]}">`;
});
for (const [axis, title] of Object.entries(data.axes)) if (axis !== "step") option(element("axis"), axis, title);
for (const name of data.figures) option(element("figure"), name, name);
data.heatMaps.forEach(({ name }, index) => option(element("run"), index, name));
element("curves-section").hidden = data.names.length === 0;
element("steps-section").hidden = data.stepNames.length === 0;
element("clients-section").hidden = data.figures.length === 0;
element("axis").onchange = element("all").onchange = drawCurves;
element("run").onchange = drawHeatMap;
element("figure").onchange = () => { drawClients(); drawHeatMap(); };
if (data.names.length) drawCurves();
if (data.stepNames.length) drawLines("steps", data.stepNames, "step");
if (data.figures.length) { drawClients(); drawHeatMap(); }
