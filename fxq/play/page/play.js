"use strict";
const byId = (id) => document.getElementById(id);
const [original] = document.getElementsByClassName("panel");
const second = original.cloneNode(true);
second.querySelector("select").id = "right";
for (const part of second.querySelectorAll("[aria-label]")) part.ariaLabel = part.ariaLabel.replace("Left", "Right");
original.after(second);
const panels = [...document.querySelectorAll(".panel")];
const canvases = panels.map((panel) => panel.querySelector("canvas"));
const NONE = "nothing";
let socket = null, welcome = null, head = null, asking = false, ended = true, paused = false;
let queue = [], history = [], shown = 0, last = 0;

function say(text) { byId("state").textContent = text; }
function refuse(text) { byId("why").textContent = text; }
function send(message) { socket.send(JSON.stringify(message)); }

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/stream`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => (typeof event.data === "string" ? hear(JSON.parse(event.data)) : take(event.data));
  socket.onclose = () => {
    say("the server has gone");
    refuse("Start fxq play again, then reload this page.");
    for (const id of ["start", "pause", "ask"]) byId(id).disabled = true;
  };
}

function hear(message) {
  if (message.kind === "welcome") greet(message);
  else if (message.kind === "refused") { asking = false; refuse(message.why); if (!history.length) say("ready"); }
  else if (message.kind === "started") begun(message);
  else if (message.kind === "asked") { refuse(""); say(`another prompt from chunk ${message.chunk + 1} on`); }
  else head = message;
}

function greet(message) {
  welcome = message;
  byId("model").textContent = message.model;
  byId("prompt").value = message.prompt;
  byId("chunks").value = message.chunks;
  for (const [index, id] of ["left", "right"].entries()) {
    const names = index ? [...message.models, NONE] : message.models;
    byId(id).replaceChildren(...names.map((name) => new Option(name, name)));
    byId(id).selectedIndex = index && message.models.length > 1 ? 1 : index ? names.length - 1 : 0;
  }
  for (const canvas of canvases) canvas.classList.toggle("pixelated", message.pixelated);
  byId("start").disabled = false;
  say("ready");
}

function begun(message) {
  queue = []; history = []; shown = 0; ended = false; paused = false; asking = false;
  refuse(""); say("making the first chunk");
  panels.forEach((panel, index) => {
    const found = message.panels[index];
    panel.classList.toggle("off", !found);
    for (const name of ["time", "fps", "cache", "drift"]) panel.querySelector(`.${name}`).textContent = "-";
    panel.querySelector(".weights").textContent = found ? bytes(found.weights) : "-";
    canvases[index].getContext("2d").clearRect(0, 0, canvases[index].width, canvases[index].height);
  });
  byId("pause").disabled = byId("ask").disabled = false;
  byId("pause").textContent = "Pause";
  byId("film").hidden = true;
  byId("charts").hidden = false;
  want();
}

function want() {
  if (asking || ended || paused || queue.length > (history.length ? head.panels[0].size[0] : 0)) return;
  asking = true;
  send({ do: "next" });
}

function take(buffer) {
  asking = false;
  ended = head.ended;
  history.push(head);
  let offset = 0;
  const parts = head.panels.map(({ size: [frames, rows, columns] }) => {
    const pixels = new Uint8Array(buffer, offset, frames * rows * columns * 3);
    offset += pixels.length;
    return { frames, rows, columns, pixels };
  });
  for (let i = 0; i < parts[0].frames; i++) queue.push(parts.map((part) => ({ ...part, i })));
  facts();
  byId("film").href = `film/${welcome.token}.mp4`;
  byId("film").hidden = false;
}

function facts() {
  head.panels.forEach((part, index) => {
    const panel = panels[index];
    panel.querySelector(".time").textContent = `${(1000 * part.seconds).toFixed(0)} ms`;
    panel.querySelector(".fps").textContent = (part.size[0] / part.seconds).toFixed(1);
    panel.querySelector(".cache").textContent = bytes(part.cache);
    panel.querySelector(".drift").textContent =
      part.decibels === null ? "-" : part.decibels === 999 ? "equal" : `${part.decibels.toFixed(1)} dB`;
  });
  draw("memory", (part) => part.cache / 1e6);
  const measured = history[0].panels.some((part) => part.decibels !== null);
  byId("driftchart").hidden = !measured;
  if (measured) draw("drift", (part) => (part.decibels === null ? null : Math.min(part.decibels, 100)));
}

function bytes(count) {
  return count < 1e6 ? `${(count / 1e3).toFixed(0)} kB` : count < 1e9 ? `${(count / 1e6).toFixed(2)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

function draw(id, value) {
  const svg = byId(id), width = svg.clientWidth || 300, height = 110, left = 44, bottom = 18;
  const lines = head.panels.map((_, index) => history.map((entry) => value(entry.panels[index])));
  const values = lines.flat().filter((found) => found !== null);
  const top = Math.max(...values) * 1.1 || 1, places = Math.max(history.length - 1, 1);
  const x = (i) => left + (i / places) * (width - left - 8), y = (found) => 6 + (1 - found / top) * (height - bottom - 6);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = lines.map((line, index) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    element.setAttribute("class", index ? "right" : "left");
    element.setAttribute("points", line.map((found, i) => (found === null ? "" : `${x(i)},${y(found)}`)).join(" "));
    return element;
  });
  const label = (text, px, py, anchor) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "text");
    element.textContent = text;
    for (const [name, given] of [["x", px], ["y", py], ["text-anchor", anchor]]) element.setAttribute(name, given);
    return element;
  };
  const most = Math.max(...values);
  svg.replaceChildren(...parts, label(most.toPrecision(3), left - 6, y(most) + 4, "end"), label("0", left - 6, y(0) + 4, "end"),
    label("chunk 1", left, height - 3, "start"), label(String(history.length), width - 8, height - 3, "end"));
}

function paint(now) {
  requestAnimationFrame(paint);
  if (!welcome || paused || !queue.length || now - last < 1000 / welcome.pace) { if (welcome && !paused) want(); return; }
  last = now;
  queue.shift().forEach(({ pixels, rows, columns, i }, index) => {
    const canvas = canvases[index];
    if (canvas.width !== columns || canvas.height !== rows) {
      canvas.width = columns; canvas.height = rows;
      canvas.style.aspectRatio = `${columns} / ${rows}`;
    }
    const image = new ImageData(columns, rows), start = i * rows * columns * 3;
    for (let p = 0, q = start; p < image.data.length; p += 4, q += 3) {
      image.data[p] = pixels[q]; image.data[p + 1] = pixels[q + 1]; image.data[p + 2] = pixels[q + 2]; image.data[p + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  });
  shown += 1;
  document.body.dataset.shown = shown;
  if (ended && !queue.length) { say(`${history.length} chunks, ${shown} frames`); byId("pause").disabled = byId("ask").disabled = true; }
  else say(`chunk ${history.length}`);
  want();
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const models = [byId("left").value, byId("right").value].filter((name) => name !== NONE);
  history = []; ended = true;
  send({ do: "start", models, prompt: byId("prompt").value, seed: Number(byId("seed").value), chunks: byId("endless").checked ? 0 : Number(byId("chunks").value) });
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").textContent = paused ? "Go on" : "Pause";
  say(paused ? "paused" : "going on");
});
byId("ask").addEventListener("click", () => send({ do: "prompt", prompt: byId("prompt").value }));
byId("endless").addEventListener("change", () => { byId("chunks").disabled = byId("endless").checked; });
connect();
requestAnimationFrame(paint);
