/* Replays recorded trainings on a circle side by side, their curves in step below.

Fills #hcl-replay from #hcl-replay-data: {steps, labels, groups: [{name, runs: [{name, turns, loss,
distance}]}]}; turns holds a list for each point, the angle in degrees and then its changes.
window.hclReplay is for the tests. */
(function () {
  "use strict";
  const root = document.getElementById("hcl-replay");
  const source = document.getElementById("hcl-replay-data");
  if (!root || !source) return;
  const DATA = JSON.parse(source.textContent);
  const LAST = DATA.steps.length - 1;
  const [LEFT, RIGHT, TOP, BASE] = [34, 312, 20, 120]; // of a curve
  const SECONDS = 12; // of a whole replay
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");

  const NS = "http://www.w3.org/2000/svg";
  function make(name, attributes = {}, parent = null, text = "") {
    const svg = parent && (parent.namespaceURI === NS || name === "svg");
    const found = svg ? document.createElementNS(NS, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    if (text) found.textContent = text;
    if (parent) parent.append(found);
    return found;
  }

  // angles (frame by frame) of every point, from their changes
  for (const group of DATA.groups) {
    for (const run of group.runs) {
      run.angles = run.turns.map((changes) => {
        let angle = 0;
        return changes.map((change) => (angle += change));
      });
    }
  }

  const state = { group: 0, frame: 0, playing: false };
  const api = { state, draw, cost: 0 };
  const SHAPES = [
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0", "M-4.5-4.5H4.5V4.5H-4.5Z", "M0-5.5L5.2 4H-5.2Z",
    "M0-6L6 0L0 6L-6 0Z", "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", "M0 5.5L5.2-4H-5.2Z",
  ];

  root.textContent = "";
  const bar = make("div", { class: "hcl-bar" }, root);
  const play = make("button", { type: "button" }, bar, "play");
  const scrub = make("label", { class: "hcl-slider" }, bar);
  make("span", {}, scrub, "step");
  const input = make("input", { type: "range", min: 0, max: LAST, step: 1, value: 0 }, scrub);
  const shown = make("output", {}, scrub);
  const pick = make("label", {}, bar, "weights ");
  const select = make("select", {}, pick);
  DATA.groups.forEach((group, k) => make("option", { value: k }, select, group.name));
  const panels = make("div", { class: "hcl-panels" }, root);
  const views = DATA.groups[0].runs.map((run, k) => panel(run, k));
  const charts = make("div", { class: "hcl-panels" }, root);
  const curves = [["loss", "loss"], ["distance", "smallest distance of two class means"]].map(curve);
  const readout = make("p", { class: "hcl-readout", role: "status", "aria-live": "polite", "aria-atomic": "true" }, root);

  function panel(run, k) {
    const figure = make("figure", {}, panels);
    const svg = make("svg", { viewBox: "-120 -120 240 240", role: "img", "aria-label": `Embeddings on the circle, ${run.name}` }, figure);
    make("circle", { r: 100, class: "hcl-line" }, svg);
    const points = DATA.labels.map((label) => make("path", { d: SHAPES[label % SHAPES.length], class: `hcl-class${label % SHAPES.length}` }, svg));
    make("figcaption", { class: `hcl-run${k}` }, figure, run.name);
    const mean = make("line", { x1: 0, y1: 0, class: "hcl-mean" }, svg);
    return { points, mean };
  }

  function curve([key, name]) {
    const svg = make("svg", { viewBox: "0 0 320 150", role: "img", "aria-label": `${name} of the three trainings against the step` }, charts);
    make("text", { x: LEFT, y: 12 }, svg, name);
    make("line", { x1: LEFT, x2: RIGHT, y1: BASE, y2: BASE, class: "hcl-line" }, svg);
    make("text", { x: LEFT, y: 136, "text-anchor": "middle" }, svg, "0");
    make("text", { x: RIGHT, y: 136, "text-anchor": "end" }, svg, `step ${DATA.steps[LAST]}`);
    const most = Math.max(...DATA.groups.flatMap((g) => g.runs.flatMap((r) => r[key])));
    make("text", { x: LEFT - 4, y: TOP + 4, "text-anchor": "end" }, svg, String(Number(most.toPrecision(2))));
    make("text", { x: LEFT - 4, y: BASE + 4, "text-anchor": "end" }, svg, "0");
    const lines = DATA.groups[0].runs.map((_, k) => make("polyline", { class: `hcl-run${k}` }, svg));
    const cursor = make("line", { y1: TOP, y2: BASE, class: "hcl-cursor" }, svg);
    return { key, most, lines, cursor };
  }
  const across = (step) => LEFT + ((RIGHT - LEFT) * step) / DATA.steps[LAST];

  function regroup() {
    const { runs } = DATA.groups[state.group];
    for (const { key, most, lines } of curves) {
      lines.forEach((line, k) => {
        const y = (value) => BASE - ((BASE - TOP) * value) / most;
        line.setAttribute("points", runs[k][key].map((value, f) => `${across(DATA.steps[f]).toFixed(1)},${y(value).toFixed(1)}`).join(" "));
      });
    }
    draw();
    tell();
  }

  /* Points between two recorded frames stand between their two angles. */
  function draw() {
    const start = performance.now();
    const low = Math.min(Math.floor(state.frame), LAST);
    const high = Math.min(low + 1, LAST);
    const part = state.frame - low;
    DATA.groups[state.group].runs.forEach((run, k) => {
      let [x, y] = [0, 0]; // of the mean of all points, that the hand shows
      run.angles.forEach((angles, j) => {
        const a = ((angles[low] + part * (angles[high] - angles[low])) * Math.PI) / 180;
        x += (100 * Math.cos(a)) / run.angles.length;
        y -= (100 * Math.sin(a)) / run.angles.length;
        // points of one angle stand beside each other, by class
        const r = 90 + (20 * DATA.labels[j]) / Math.max(1, DATA.labels[DATA.labels.length - 1]);
        views[k].points[j].setAttribute("transform", `translate(${(r * Math.cos(a)).toFixed(1)} ${(-r * Math.sin(a)).toFixed(1)})`);
      });
      views[k].mean.setAttribute("x2", x.toFixed(1));
      views[k].mean.setAttribute("y2", y.toFixed(1));
    });
    const step = DATA.steps[low] + part * (DATA.steps[high] - DATA.steps[low]);
    for (const { cursor } of curves) {
      cursor.setAttribute("x1", across(step));
      cursor.setAttribute("x2", across(step));
    }
    input.value = low;
    shown.textContent = Math.round(step);
    input.setAttribute("aria-valuetext", `step ${Math.round(step)} of ${DATA.steps[LAST]}`);
    api.cost = performance.now() - start;
  }
  /* The sentence that is read out, when the replay stands still. */
  function tell() {
    const frame = Math.floor(state.frame);
    const said = DATA.groups[state.group].runs.map((run) => `${run.name}: loss ${run.loss[frame]}, smallest distance of two class means ${run.distance[frame]}`);
    readout.textContent = `Step ${DATA.steps[frame]}. ${said.join("; ")}.`;
  }

  let before = 0;
  function tick(now) {
    if (!state.playing) return;
    // a frame's time may be earlier than the click that asked for it
    const next = state.frame + (Math.max(0, now - before) / 1000) * (LAST / SECONDS);
    if (!still.matches || Math.floor(next) > Math.floor(state.frame)) {
      // without motion, points jump from frame to frame, twice a second
      state.frame = Math.min(LAST, still.matches ? Math.floor(next) : next);
      before = now;
      draw();
    }
    if (state.frame >= LAST) pause();
    else if (still.matches) setTimeout(() => requestAnimationFrame(tick), 500);
    else requestAnimationFrame(tick);
  }
  function pause() {
    state.playing = false;
    state.frame = Math.round(state.frame);
    play.textContent = "play";
    draw();
    tell();
  }
  play.addEventListener("click", () => {
    if (state.playing) {
      pause();
      return;
    }
    if (state.frame >= LAST) state.frame = 0;
    state.playing = true;
    play.textContent = "pause";
    before = performance.now();
    requestAnimationFrame(tick);
  });
  let due = 0;
  input.addEventListener("input", () => {
    const frame = Number(input.value);
    if (state.playing) pause();
    state.frame = frame;
    draw();
    clearTimeout(due);
    due = setTimeout(tell, 250);
  });
  select.addEventListener("change", () => {
    state.group = Number(select.value);
    regroup();
  });

  window.hclReplay = api;
  regroup();
})();
