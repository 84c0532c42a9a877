"use strict";
// Shows how the model is asked now, and sends it requests. The element `data` holds its description and an example.

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const PERIOD_SECONDS = 2, POINTS = 60, MAX_SHOWN = 200_000, MAX_SCORES = 10, MAX_ROWS = 8;

// --- Now: differences of the counters of /metrics

const SAMPLE = /^(\w+)\{([^}]*)\}\s+(\S+)/;

// The sums of the model's counters over its versions, by their names without nv_inference_.
function counters(text) {
  const sums = { request_success: 0, request_failure: 0, request_duration_us: 0, queue_duration_us: 0, count: 0, exec_count: 0 };
  for (const line of text.split("\n")) {
    const [, name, labels, value] = SAMPLE.exec(line) ?? [];
    const key = name?.replace(/^nv_inference_/, "").replace(/_total$/, "");
    if (key in sums && `,${labels}`.includes(`,model="${data.model}"`)) sums[key] += Number(value);
  }
  return { ...sums, time: performance.now() / 1000 };
}

const history = [];
let last = null;

function milliseconds(microseconds, requests) {
  return requests > 0 ? `${(microseconds / requests / 1000).toPrecision(3)} ms` : "–";
}

async function look() {
  try {
    const response = await fetch("metrics", { cache: "no-store" });
    if (!response.ok) throw new Error(`/metrics answered ${response.status}`);
    const now = counters(await response.text());
    if (last) show(now, last);
    last = now;
    element("live-error").textContent = "";
  } catch (error) {
    element("live-error").textContent = `The server does not answer: ${error.message}`;
    last = null;
  }
}

function show(now, before) {
  const change = Object.fromEntries(Object.keys(now).map((key) => [key, now[key] - before[key]]));
  if (Object.values(change).some((value) => value < 0)) return; // the server has been started again
  const rate = change.request_success / change.time;
  element("rate").textContent = rate.toFixed(rate < 10 ? 1 : 0);
  element("latency").textContent = milliseconds(change.request_duration_us, change.request_success);
  element("queue").textContent = milliseconds(change.queue_duration_us, change.request_success);
  element("batch").textContent = change.exec_count > 0 ? (change.count / change.exec_count).toFixed(1) : "–";
  element("failed").textContent = now.request_failure.toLocaleString("en");
  history.push(rate);
  if (history.length > POINTS) history.shift();
  const top = Math.max(1, ...history);
  const point = (value, index) => `${(index + POINTS - history.length) * 120 / (POINTS - 1)},${(29 - 28 * value / top).toFixed(2)}`;
  element("history").firstElementChild.setAttribute("points", history.map(point).join(" "));
}

// --- Try it: the request, which the drawing, the file and the fields write, and which can be edited

let request = data.example;

function setRequest(wanted) {
  request = wanted;
  const text = JSON.stringify(wanted);
  const shown = text.length <= MAX_SHOWN;
  element("request").value = shown ? text : `(${text.length.toLocaleString("en")} characters: too many to be shown)`;
  element("request").readOnly = !shown;
}

function setInput(values) {
  const [{ name, datatype, shape }] = data.inputs;
  setRequest({ inputs: [{ name, datatype, shape: [1, ...shape.slice(1)], data: values }] });
}

// --- a picture

const [input] = data.inputs;
const isPicture = data.inputs.length === 1 && input.shape.length === 4 && [1, 3].includes(input.shape[1])
  && input.shape.slice(2).every((size) => size > 1 && size <= 1024);
const isInteger = /INT/.test(input?.datatype);

function startDrawing() {
  const [, channels, height, width] = input.shape;
  const canvas = element("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
  [canvas.width, canvas.height] = [width, height];
  let cursor = [width >> 1, height >> 1], last = null;

  const clear = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
  };
  const read = () => {
    const pixels = context.getImageData(0, 0, width, height).data;
    const value = (byte) => (isInteger ? byte : byte / 255);
    const plane = (channel) => Array.from({ length: width * height }, (_, index) => value(pixels[4 * index + channel]));
    const grey = () => Array.from({ length: width * height }, (_, index) => {
      const byte = 0.299 * pixels[4 * index] + 0.587 * pixels[4 * index + 1] + 0.114 * pixels[4 * index + 2];
      return value(isInteger ? Math.round(byte) : byte);
    });
    setInput(channels === 1 ? grey() : [0, 1, 2].flatMap(plane));
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height];
  };
  const line = (from, to) => {
    context.strokeStyle = "#fff";
    context.lineCap = "round";
    context.lineWidth = Math.max(1, Math.min(width, height) / 12);
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    line(last, next);
    last = next;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => {
    last = null;
    read();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    cursor = [Math.min(width - 1, Math.max(0, cursor[0] + step[0])), Math.min(height - 1, Math.max(0, cursor[1] + step[1]))];
    if (event.key === " ") {
      context.fillStyle = "#fff";
      context.fillRect(...cursor, 1, 1);
      read();
    }
    canvas.setAttribute("aria-label", `Drawing, at column ${cursor[0] + 1}, row ${cursor[1] + 1}`);
  });
  const readFile = async () => {
    const [file] = element("file").files;
    if (!file) return;
    try {
      const picture = await createImageBitmap(file);
      context.filter = element("invert").checked ? "invert(1)" : "none";
      clear();
      context.drawImage(picture, 0, 0, width, height);
      context.filter = "none";
      read();
    } catch (error) {
      fail(`${file.name} is no picture that this browser reads`);
    }
  };
  element("file").addEventListener("change", readFile);
  element("invert").addEventListener("change", readFile);
  element("clear").addEventListener("click", () => {
    clear();
    element("file").value = "";
    read();
  });
  clear();
  element("drawing").hidden = false;
}

// --- a row of a table, encoded as columns.json says

function startFields({ numbers, categories }) {
  const fields = element("fields");
  const controls = [
    ...Object.keys(numbers).map((name) => Object.assign(document.createElement("input"), { name, type: "number", step: "any" })),
    ...Object.entries(categories).map(([name, each]) => {
      const select = Object.assign(document.createElement("select"), { name });
      for (const option of ["", ...each.categories]) select.add(new Option(option, option));
      return select;
    }),
  ];
  for (const control of controls) {
    const label = document.createElement("label");
    label.append(control.name, control);
    fields.append(label);
  }
  fields.addEventListener("input", () => {
    const value = Object.fromEntries(controls.map((control) => [control.name, control.value]));
    setInput([
      ...Object.entries(numbers).map(([name, { fill, mean, std }]) => ((value[name] === "" ? fill : Number(value[name])) - mean) / std),
      ...Object.entries(categories).flatMap(([name, each]) => each.categories.map((one) => Number(one === (value[name] || each.fill)))),
    ]);
  });
  fields.hidden = false;
}

// --- the answer

function fail(text) {
  element("answer").replaceChildren(Object.assign(document.createElement("p"), { className: "bad", textContent: text }));
  element("reply-details").hidden = true;
}

const nameOf = (label) => data.labels[label] ?? `${label}`;

// A table of the greatest scores of a row, and the label of the row.
function scoreTable(scores, caption) {
  const table = document.createElement("table");
  table.createCaption().textContent = caption;
  const head = table.createTHead().insertRow();
  for (const text of ["label", "score", ""]) head.append(Object.assign(document.createElement("th"), { textContent: text, scope: "col" }));
  const order = scores.map((score, label) => [score, label]).sort((one, other) => other[0] - one[0]).slice(0, MAX_SCORES);
  const body = table.createTBody();
  for (const [score, label] of order) {
    const row = body.insertRow();
    row.append(Object.assign(document.createElement("th"), { textContent: nameOf(label), scope: "row" }));
    row.insertCell().textContent = score?.toFixed(4) ?? "NaN"; // JSON has no number for it
    const meter = Object.assign(document.createElement("meter"), { value: score ?? 0 });
    meter.setAttribute("aria-label", `score of ${nameOf(label)}`);
    row.insertCell().append(meter);
  }
  return table;
}

function showReply(reply, seconds) {
  const outputs = Object.fromEntries(reply.outputs.map((output) => [output.name, output]));
  const rows = reply.outputs[0].shape[0];
  const parts = [Object.assign(document.createElement("p"), {
    className: "dim", textContent: `version ${reply.model_version}, ${(1000 * seconds).toFixed(1)} ms as seen from here`,
  })];
  for (let row = 0; row < Math.min(rows, MAX_ROWS); row++) {
    const of = (name) => {
      const size = outputs[name].data.length / rows;
      return outputs[name].data.slice(row * size, (row + 1) * size);
    };
    const label = outputs.label && outputs.label.shape.length === 1 ? nameOf(of("label")[0]) : null;
    const caption = [rows > 1 ? `example ${row + 1}` : "", label ?? ""].filter(Boolean).join(": ");
    if (outputs.scores?.shape.length === 2) parts.push(scoreTable(of("scores"), caption));
    else parts.push(Object.assign(document.createElement("p"), { textContent: caption || of(reply.outputs[0].name).slice(0, MAX_SCORES).join(", ") }));
  }
  element("answer").replaceChildren(...parts);
  const text = JSON.stringify(reply);
  element("reply").textContent = text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)} ...` : text;
  element("reply-details").hidden = false;
}

element("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!element("request").readOnly) {
    try {
      request = JSON.parse(element("request").value);
    } catch (error) {
      fail(`The request is no JSON: ${error.message}`);
      return;
    }
  }
  const begun = performance.now();
  try {
    const response = await fetch(`v2/models/${encodeURIComponent(data.model)}/infer`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request),
    });
    const reply = await response.json();
    if (response.ok) showReply(reply, (performance.now() - begun) / 1000);
    else fail(reply.error ?? `the server answered ${response.status}`);
  } catch (error) {
    fail(`The server does not answer: ${error.message}`);
  }
});

element("example").addEventListener("click", () => setRequest(data.example));

setRequest(data.example);
if (data.columns) startFields(data.columns);
else if (isPicture) startDrawing();
else element("request-details").open = true;
look();
setInterval(look, 1000 * PERIOD_SECONDS);
