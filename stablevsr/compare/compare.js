"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const rate = data.rate[0] / data.rate[1];
  const isStill = data.frames === 1;
  const stage = byId("stage"), canvas = byId("view"), divider = byId("divider"), pen = canvas.getContext("2d");
  const left = byId("left"), right = byId("right"), play = byId("play"), seek = byId("seek");
  const source = isStill ? new Image() : document.createElement("video");
  const state = {
    split: 0.5, // position of the divider, as a share of the stage
    zoom: 0, // screen pixels per pixel of a version; 0: fit
    x: data.width / 2, y: data.height / 2, // the centre of the stage, in pixels of a version
    frame: 0, // the frame on screen
    wanted: 0, // the frame being sought
    ready: false,
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // ---- the picture

  function fitting(width, height) {
    const fit = Math.min(width / data.width, height / data.height);
    return fit > 1 ? Math.floor(fit) : fit; // an integer factor keeps all pixels the same size
  }

  const scale = () => state.zoom ? state.zoom * data.shrink : fitting(canvas.width, canvas.height);

  // Offset of the version on one axis, in screen pixels: centred when it is smaller, else without a gap.
  function origin(room, length, middle) {
    if (length <= room) return Math.floor((room - length) / 2);
    return Math.round(clamp(room / 2 - middle, room - length, 0));
  }

  function draw() {
    const factor = scale(), width = data.width * factor, height = data.height * factor;
    const x = origin(canvas.width, width, state.x * factor), y = origin(canvas.height, height, state.y * factor);
    const border = Math.round(state.split * canvas.width);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (!state.ready) return;
    pen.imageSmoothingEnabled = factor < 1;
    pen.imageSmoothingQuality = "high";
    for (const [pick, from, to] of [[left, 0, border], [right, border, canvas.width]]) {
      const [tileX, tileY] = data.tiles[pick.value];
      pen.save();
      pen.beginPath();
      pen.rect(from, 0, to - from, canvas.height);
      pen.clip();
      pen.drawImage(source, tileX, tileY, data.width, data.height, x, y, width, height);
      pen.restore();
    }
    canvas.dataset.frame = state.frame;
    const fits = width <= canvas.width && height <= canvas.height;
    stage.style.touchAction = fits ? "pan-y pinch-zoom" : "none";
    stage.style.cursor = fits ? "ew-resize" : "grab";
    stage.dataset.fits = fits;
  }

  function resize() {
    const room = Math.max(window.innerHeight * 0.72, 200);
    const factor = fitting(stage.clientWidth * devicePixelRatio, room * devicePixelRatio);
    stage.style.height = `${Math.ceil(Math.max(data.height * factor / devicePixelRatio, 160))}px`;
    canvas.width = Math.max(1, Math.round(stage.clientWidth * devicePixelRatio));
    canvas.height = Math.max(1, Math.round(stage.clientHeight * devicePixelRatio));
    draw();
  }

  function shown(frame) {
    state.frame = state.wanted = clamp(frame, 0, data.frames - 1);
    seek.value = state.frame;
    byId("frame").textContent = `${state.frame} of 0–${data.frames - 1}`;
    for (const chart of document.querySelectorAll(".chart")) {
      const {left: start, width, frames} = chart.dataset;
      const x = Number(start) + Number(width) * state.frame / Math.max(frames - 1, 1);
      const line = chart.querySelector(".now");
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
    draw();
  }

  function split(share) {
    state.split = clamp(share, 0, 1);
    divider.style.left = `${100 * state.split}%`;
    divider.setAttribute("aria-valuenow", Math.round(100 * state.split));
    draw();
  }

  function zoom(value) {
    state.zoom = value;
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.zoom) === value));
    }
    draw();
  }

  function pan(x, y) { // in screen pixels
    const factor = scale();
    const keep = (middle, room, length) =>
      length * factor <= room ? length / 2 : clamp(middle, room / 2 / factor, length - room / 2 / factor);
    state.x = keep(state.x - x / factor, canvas.width, data.width);
    state.y = keep(state.y - y / factor, canvas.height, data.height);
    draw();
  }

  function sides() {
    const name = (pick) => data.labels[pick.value];
    byId("left-tag").textContent = name(left);
    byId("right-tag").textContent = name(right);
    divider.setAttribute("aria-valuetext", `left ${name(left)}, right ${name(right)}`);
    draw();
  }

  function turn(pick) {
    pick.value = (Number(pick.value) + 1) % data.labels.length;
    sides();
  }

  function swap() {
    [left.value, right.value] = [right.value, left.value];
    sides();
  }

  // ---- time

  // The middle of a frame's interval, so that rounding never hits its neighbour.
  const timeOf = (frame) => (frame + 0.5) / rate;

  function go(frame) {
    if (isStill) return;
    source.pause();
    state.wanted = clamp(frame, 0, data.frames - 1);
    if (!source.seeking) source.currentTime = timeOf(state.wanted); // else `seeked` continues with the last request
  }

  function soughtOut() {
    const reached = Math.floor(source.currentTime * rate);
    if (source.paused && reached !== state.wanted) source.currentTime = timeOf(state.wanted);
    else if (source.paused) shown(state.wanted);
  }

  // During playback: the browser reports the frame it shows, or we read the clock.
  function follow() {
    if (source.requestVideoFrameCallback) {
      source.requestVideoFrameCallback((_, news) => {
        if (!source.paused) shown(Math.round(news.mediaTime * rate));
        else draw(); // `seeked` may have fired before this frame was ready
        follow();
      });
      return;
    }
    const look = () => {
      if (!source.paused) shown(Math.floor(source.currentTime * rate));
      requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  }

  function toggle() {
    if (isStill) return;
    if (source.paused) source.play().catch(() => {}); // an immediate pause is not a failure
    else go(state.frame);
  }

  // ---- input

  let drag = null;

  function press(event) {
    if (event.button) return;
    const onDivider = event.target === divider;
    const fits = stage.dataset.fits === "true";
    drag = {kind: onDivider || fits ? "split" : "pan", x: event.clientX, y: event.clientY};
    stage.setPointerCapture(event.pointerId);
    if (drag.kind === "split" && !onDivider) move(event);
  }

  function move(event) {
    if (!drag) return;
    const box = stage.getBoundingClientRect();
    if (drag.kind === "split") split((event.clientX - box.left) / box.width);
    else pan((event.clientX - drag.x) * devicePixelRatio, (event.clientY - drag.y) * devicePixelRatio);
    drag.x = event.clientX;
    drag.y = event.clientY;
  }

  const keys = {
    " ": toggle,
    ArrowLeft: (event) => go(state.wanted - (event.shiftKey ? 10 : 1)),
    ArrowRight: (event) => go(state.wanted + (event.shiftKey ? 10 : 1)),
    Home: () => go(0),
    End: () => go(data.frames - 1),
    ",": () => split(state.split - 0.05),
    ".": () => split(state.split + 0.05),
    l: () => turn(left),
    r: () => turn(right),
    x: swap,
    0: () => zoom(0),
    1: () => zoom(1),
    2: () => zoom(2),
    4: () => zoom(4),
    w: () => pan(0, 60 * devicePixelRatio),
    s: () => pan(0, -60 * devicePixelRatio),
    a: () => pan(60 * devicePixelRatio, 0),
    d: () => pan(-60 * devicePixelRatio, 0),
  };
  const dividerKeys = {
    ArrowLeft: (event) => split(state.split - (event.shiftKey ? 0.1 : 0.01)),
    ArrowRight: (event) => split(state.split + (event.shiftKey ? 0.1 : 0.01)),
    ArrowDown: () => split(state.split - 0.01),
    ArrowUp: () => split(state.split + 0.01),
    PageDown: () => split(state.split - 0.1),
    PageUp: () => split(state.split + 0.1),
    Home: () => split(0),
    End: () => split(1),
  };

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    if (target.matches("select, input")) return; // they handle keys themselves
    if (event.key === " " && target.matches("button, summary")) return;
    if (event.key.startsWith("Arrow") && target.matches(".row, .scroll")) return; // keys scroll them
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = (target === divider && dividerKeys[name]) || keys[name];
    if (!action) return;
    event.preventDefault();
    action(event);
  }

  // ---- start

  function fail(reason) {
    byId("problem").textContent = reason;
    byId("problem").hidden = false;
  }

  function blob(text, type) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return URL.createObjectURL(new Blob([bytes], {type}));
  }

  function load() {
    const text = byId("media").textContent, type = isStill ? "image/png" : "video/mp4";
    const addresses = text ? [blob(text, type), `data:${type};base64,${text}`] : [data.url];
    source.addEventListener("error", () => {
      addresses.shift();
      if (addresses.length) source.src = addresses[0];
      else if (text) fail("This browser cannot show the stream of this page (H.264 in MP4): use another one.");
      else fail(`${decodeURIComponent(data.url)} is not beside this page, or this browser cannot show it.`);
    });
    source.addEventListener(isStill ? "load" : "loadeddata", () => {
      state.ready = true;
      if (isStill) draw();
      else go(0);
    });
    if (!isStill) {
      source.muted = source.loop = source.playsInline = true;
      source.preload = "auto";
      source.setAttribute("aria-hidden", "true");
      source.tabIndex = -1;
      source.addEventListener("seeked", soughtOut);
      for (const name of ["play", "pause"]) {
        source.addEventListener(name, () => { play.textContent = source.paused ? "Play" : "Pause"; });
      }
      stage.prepend(source);
      follow();
    }
    source.src = addresses[0];
  }

  function jump(event) {
    const {frame, x, y} = event.currentTarget.dataset;
    go(Number(frame));
    if (x !== undefined) {
      [state.x, state.y] = [Number(x) / data.shrink, Number(y) / data.shrink];
      zoom(4);
    }
    stage.scrollIntoView({block: "center"});
  }

  function pointAt(event) {
    const chart = event.currentTarget, box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width - Number(chart.dataset.left);
    go(Math.round(x / Number(chart.dataset.width) * (data.frames - 1)));
  }

  for (const pick of [left, right]) {
    data.labels.forEach((label, index) => pick.add(new Option(label, index)));
    pick.addEventListener("change", sides);
  }
  right.value = Math.min(1, data.labels.length - 1);
  seek.max = data.frames - 1;
  seek.addEventListener("input", () => go(Number(seek.value)));
  play.addEventListener("click", toggle);
  byId("back").addEventListener("click", () => go(state.wanted - 1));
  byId("forward").addEventListener("click", () => go(state.wanted + 1));
  byId("swap").addEventListener("click", swap);
  byId("speed").addEventListener("change", (event) => { source.playbackRate = Number(event.target.value); });
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
  }
  for (const button of document.querySelectorAll("button[data-frame]")) button.addEventListener("click", jump);
  for (const chart of document.querySelectorAll(".chart")) chart.addEventListener("click", pointAt);
  stage.addEventListener("pointerdown", press);
  stage.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
    stage.addEventListener(name, () => { drag = null; });
  }
  document.addEventListener("keydown", key);
  new ResizeObserver(resize).observe(stage);
  window.addEventListener("resize", resize);
  sides();
  split(0.5);
  resize();
  load();
})();
