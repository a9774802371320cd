(() => {
  "use strict";
  const $ = (id) => document.getElementById(id);

  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((h) => h.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.sort;
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every((row) => key(row) !== "" && isFinite(key(row)));
      const compare = numeric ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b));
      rows.sort((a, b) => (descending ? -1 : 1) * compare(a, b));
      table.tBodies[0].append(...rows);
    }));
  }

  if (!$("player-data")) return;
  const { clips, framesPerChunk, first } = JSON.parse($("player-data").textContent);
  const state = { clip: 0, version: first, frame: 0, playing: false, sheets: null, token: 0 };
  const screens = ["a", "b", "d"].map((name) => $("screen-" + name).getContext("2d", { willReadFrequently: true }));

  const option = (text, value) => Object.assign(document.createElement("option"), { textContent: text, value });
  const number = (x) => x === 0 ? "0" : x >= 0.001 ? x.toPrecision(2).replace(/e.*/, "") : x.toExponential(1);
  const clip = () => clips[state.clip];
  const chunkOf = (frame) => Math.floor(frame / framesPerChunk);

  async function pixels(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context;
  }

  function frameOf(sheet, index) {
    const { width, height, columns } = clip();
    return sheet.getImageData((index % columns) * width, Math.floor(index / columns) * height, width, height);
  }

  function draw() {
    const { count } = clip();
    $("scrub").value = state.frame;
    const chunk = chunkOf(state.frame);
    $("scrub").setAttribute("aria-valuetext", `frame ${state.frame + 1} of ${count}, chunk ${chunk + 1}`);
    $("clock").value = `frame ${state.frame + 1} / ${count}, chunk ${chunk + 1}`;
    [...$("chunk-bars").children].forEach((bar, i) => bar.classList.toggle("now", i === chunk));
    if (!state.sheets) return;
    const gain = Number($("gain").value);
    const [a, b] = state.sheets.map((sheet) => frameOf(sheet, state.frame));
    const difference = new ImageData(a.width, a.height);
    let sum = 0;
    for (let i = 0; i < a.data.length; i++) {
      if (i % 4 === 3) { difference.data[i] = 255; continue; }
      const d = Math.abs(a.data[i] - b.data[i]);
      sum += d;
      difference.data[i] = gain * d;
    }
    [a, b, difference].forEach((image, i) => screens[i].putImageData(image, 0, 0));
    const mean = (sum / (a.data.length * 0.75)).toFixed(1);
    $("label-d").textContent = `Absolute difference, amplified ${gain}x (mean\u00a0${mean}\u00a0of\u00a0255)`;
  }

  function bars() {
    const { count, errors } = clip();
    const chunks = Math.ceil(count / framesPerChunk);
    const values = errors[state.version] || [];
    const top = Math.max(...values.filter((x) => x !== null), 0);
    $("chunk-lines").replaceChildren();
    $("chunk-bars").replaceChildren();
    for (let i = 0; i < chunks; i++) {
      const start = i * framesPerChunk, length = Math.min(framesPerChunk, count - start);
      if (i) {
        const line = document.createElement("i");
        line.style.left = `${100 * start / count}%`;
        $("chunk-lines").append(line);
      }
      const value = values[i] ?? null;
      const bar = Object.assign(document.createElement("button"), { type: "button", title: `Go to chunk ${i + 1}` });
      bar.style.width = `${100 * length / count}%`;
      const figure = document.createElement("b");
      figure.textContent = value === null ? "–" : number(value);
      const column = document.createElement("div");
      column.className = "column";
      const fill = document.createElement("i");
      fill.style.height = `${value === null || !top ? 0 : 100 * value / top}%`;
      column.append(fill);
      const label = document.createElement("span");
      label.textContent = i + 1;
      bar.append(figure, column, label);
      bar.addEventListener("click", () => seek(start));
      $("chunk-bars").append(bar);
    }
    $("bars-note").textContent = values.length
      ? `Latent MSE of ${state.version} in each chunk of this clip; bars are scaled to its largest. Click a chunk to go there.`
      : "No per-chunk errors were recorded for this version.";
  }

  function size() {
    $("player").style.setProperty("--thumb", `${$("scrub").clientWidth / clip().count}px`);
  }

  async function load() {
    const current = clip(), token = ++state.token;
    $("prompt").textContent = current.prompt;
    $("label-a").textContent = current.reference;
    $("label-b").textContent = state.version;
    for (const screen of screens) {
      if (screen.canvas.width === current.width && screen.canvas.height === current.height) continue;
      Object.assign(screen.canvas, { width: current.width, height: current.height });
    }
    $("scrub").max = current.count - 1;
    state.frame = Math.min(state.frame, current.count - 1);
    bars();
    size();
    const sheets = await Promise.all([current.reference, state.version].map((name) => pixels(current.sheets[name])));
    if (token !== state.token) return;
    state.sheets = sheets;
    draw();
  }

  function seek(frame) {
    state.frame = frame;
    draw();
  }

  function choose(index) {
    state.clip = index;
    state.sheets = null;
    const { versions } = clip();
    if (!versions.includes(state.version)) state.version = versions[versions.length - 1];
    $("version").replaceChildren(...versions.map((name) => option(name, name)));
    $("version").value = state.version;
    load();
  }

  let last = 0, owed = 0;
  function tick(now) {
    if (!state.playing) return;
    owed += (now - last) * 6 * Number($("speed").value) / 1000;
    last = now;
    if (owed >= 1) {
      state.frame = (state.frame + Math.floor(owed)) % clip().count;
      owed %= 1;
      draw();
    }
    requestAnimationFrame(tick);
  }

  function play(on) {
    state.playing = on;
    $("play").textContent = on ? "Pause" : "Play";
    last = performance.now();
    if (on) requestAnimationFrame(tick);
  }

  clips.forEach((c, i) => $("clip").append(option(`${i + 1}. ${c.prompt}`, i)));
  $("clip").addEventListener("change", () => choose(Number($("clip").value)));
  $("version").addEventListener("change", () => { state.version = $("version").value; load(); });
  $("gain").addEventListener("change", draw);
  $("play").addEventListener("click", () => play(!state.playing));
  $("scrub").addEventListener("input", () => seek(Number($("scrub").value)));
  new ResizeObserver(size).observe($("scrub"));
  $("player").hidden = false;
  choose(0);
})();
