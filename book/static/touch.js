/* Points on a circle or a sphere to drag: the weights of an anchor's negatives, and the forces.

Fills #hcl-touch with scenes read from #hcl-touch-data, which a cell of the notebook writes. All
numbers come from weights.js. window.hclTouch is for the tests. */
(function () {
  "use strict";
  const root = document.getElementById("hcl-touch");
  const data = document.getElementById("hcl-touch-data");
  if (!root || !data || !window.hclWeights) return;
  const SCENES = JSON.parse(data.textContent);

  const BETAS = [0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 1e6];
  const TEMPERATURES = [0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.5, 2];
  const PRIORS = [0, 0.01, 0.02, 0.03, 0.05, ...Array.from({ length: 18 }, (_, k) => (k + 2) / 20)];
  const RADIUS = 140; // of the circle, in units of the drawing
  const LONGEST = 70; // of an arrow
  const STEP = Math.PI / 36; // of an arrow key

  // --- elements

  const NS = "http://www.w3.org/2000/svg";
  function make(name, attributes = {}, parent = null, text = "") {
    const svg = parent && (parent.namespaceURI === NS || name === "svg");
    const found = svg ? document.createElementNS(NS, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    if (text) found.textContent = text;
    if (parent) parent.append(found);
    return found;
  }
  function set(element, attributes) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  }
  /* Three digits, and a power of ten where that is shorter; never NaN or Infinity. */
  function number(x) {
    if (!Number.isFinite(x)) return "out of range";
    if (x === 0) return "0";
    if (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) {
      const [digits, power] = x.toExponential(1).split("e");
      return `${digits} × 10^${Number(power)}`.replace("-", "−").replace("^-", "^−");
    }
    return String(Number(x.toPrecision(3))).replace("-", "−");
  }
  const percent = (x) => (x > 0 && x < 0.001 ? "under 0.1\u00a0%" : `${Number((100 * x).toFixed(1))}\u00a0%`);

  // --- state: unit vectors (x, y, z), on the circle with z = 0

  const state = { space: "circle", scene: 0, points: [], turn: 0, options: {} };

  function vector([clock, height]) {
    const a = (clock * Math.PI) / 180;
    const b = state.space === "sphere" ? (height * Math.PI) / 180 : 0;
    return [Math.sin(a) * Math.cos(b), Math.cos(a) * Math.cos(b), Math.sin(b)];
  }
  function load(index) {
    const scene = SCENES[index];
    state.scene = index;
    const { temperature, beta, tau_plus: tauPlus, detach, debias } = scene;
    state.options = { temperature, beta, tauPlus, detach, debias };
    state.points = [
      { name: "anchor", v: vector(scene.anchor) },
      { name: "positive", v: vector(scene.positive) },
      ...scene.negatives.map(([clock, height, same], k) => ({
        name: `negative ${k + 1}${same ? ", of the anchor's class" : ""}`,
        same: Boolean(same),
        v: vector([clock, height]),
      })),
    ];
  }
  const normalised = (v) => v.map((x) => x / Math.hypot(...v));
  const plus = (a, b, c = 1) => a.map((x, k) => x + c * b[k]);
  const dot = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);

  // --- the view: a sphere is turned about its upright axis and tipped a little to the reader

  const TIP = 0.35;
  function seen([x, y, z]) {
    if (state.space === "circle") return [x, y, 0];
    const [c, s] = [Math.cos(state.turn), Math.sin(state.turn)];
    const [X, Z] = [c * x + s * z, c * z - s * x];
    return [X, Math.cos(TIP) * y - Math.sin(TIP) * Z, Math.sin(TIP) * y + Math.cos(TIP) * Z];
  }
  function unseen([X, Y, Z]) {
    if (state.space === "circle") return [X, Y, 0];
    const y = Math.cos(TIP) * Y + Math.sin(TIP) * Z;
    const depth = Math.cos(TIP) * Z - Math.sin(TIP) * Y;
    const [c, s] = [Math.cos(state.turn), Math.sin(state.turn)];
    return [c * X - s * depth, y, s * X + c * depth];
  }
  const place = (v) => [RADIUS * v[0], -RADIUS * v[1]];

  /* A point goes where the pointer is: on the circle in its direction, on the side of the sphere
  that it was on. The centre of the circle has no direction: there the point stays. */
  function drag(point, X, Y) {
    const r = Math.hypot(X, Y);
    if (state.space === "circle" || r >= 1) {
      if (r > 0.05) point.v = normalised(unseen([X, Y, 0]));
    } else {
      const side = seen(point.v)[2] < 0 ? -1 : 1;
      point.v = normalised(unseen([X, Y, side * Math.sqrt(1 - r * r)]));
    }
  }
  /* Arrow keys: with the clock or against it on the circle, as they point on the sphere. */
  function nudge(point, key, size) {
    const [right, up] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key];
    if (state.space === "circle") {
      const angle = Math.atan2(point.v[0], point.v[1]) + (right + up) * size;
      point.v = [Math.sin(angle), Math.cos(angle), 0];
      return;
    }
    const wish = unseen([right, up, 0]);
    const along = plus(wish, point.v, -dot(wish, point.v));
    if (Math.hypot(...along) > 1e-6) {
      point.v = normalised(plus(point.v.map((x) => x * Math.cos(size)), normalised(along), Math.sin(size)));
    }
  }

  // --- the page's parts

  root.textContent = "";
  const bar = make("div", { class: "hcl-bar" }, root);
  const scenes = choice(bar, "scene", SCENES.map((s) => s.name), (k) => { load(k); rebuild(); });
  const spaces = choice(bar, "points on", ["a circle", "a sphere"], (k) => {
    state.space = k ? "sphere" : "circle";
    load(state.scene);
    rebuild();
  });
  const about = make("p", { class: "hcl-about" }, root);
  const board = make("div", { class: "hcl-board" }, root);
  const stage = make("svg", { viewBox: "-180 -180 360 360", class: "hcl-stage", role: "group", "aria-label": "Points to move with the arrow keys, with Shift by small steps" }, board);
  const side = make("div", { class: "hcl-side" }, board);
  const chart = make("svg", { viewBox: "0 0 320 250", class: "hcl-chart", role: "img", "aria-label": "Weight and derivative of the loss of every negative against its cosine; the table below has the numbers" }, side);
  const sliders = {
    beta: slider("hardness β", BETAS, "beta"),
    temperature: slider("temperature t", TEMPERATURES, "temperature"),
    tauPlus: slider("class prior τ⁺", PRIORS, "tauPlus"),
  };
  const turning = slider("turn the sphere", Array.from({ length: 73 }, (_, k) => 5 * k - 180), null);
  const switches = make("div", { class: "hcl-bar" }, side);
  const attached = make("input", { type: "checkbox", id: "hcl-attached" });
  const label = make("label", { for: "hcl-attached" }, switches);
  label.append(attached, " gradient through the weights");
  attached.addEventListener("change", () => { state.options.detach = !attached.checked; draw(); });
  const DEBIAS = ["released", "separate", "none"];
  const debias = choice(switches, "debiasing", DEBIAS, (k) => { state.options.debias = DEBIAS[k]; draw(); });
  const buttons = make("div", { class: "hcl-bar" }, side);
  button(buttons, "one step along the arrows", follow);
  button(buttons, "back to the scene", () => { load(state.scene); rebuild(); });
  const readout = make("p", { class: "hcl-readout", role: "status", "aria-live": "polite", "aria-atomic": "true" }, root);
  const details = make("details", { class: "hcl-details" }, root);
  make("summary", {}, details, "The numbers of every negative");
  const table = make("table", {}, details);
  details.addEventListener("toggle", () => draw());

  function choice(parent, name, values, chosen) {
    const label = make("label", {}, parent, `${name} `);
    const select = make("select", {}, label);
    values.forEach((value, k) => make("option", { value: k }, select, value));
    select.addEventListener("change", () => chosen(Number(select.value)));
    return select;
  }
  function button(parent, text, pressed) {
    make("button", { type: "button" }, parent, text).addEventListener("click", pressed);
  }
  /* A native range over the places of a list of values, with its value beside it. */
  function slider(name, values, option) {
    const row = make("label", { class: "hcl-slider" }, side);
    make("span", {}, row, name);
    const input = make("input", { type: "range", min: 0, max: values.length - 1, step: 1 }, row);
    const shown = make("output", {}, row);
    const show = (value) => {
      const distance = (k) => Math.abs(values[k] - value);
      input.value = values.reduce((best, _, k) => (distance(k) < distance(best) ? k : best), 0);
      shown.textContent = option ? (value >= 1e6 ? "10^6" : number(value)) : `${value}°`;
      input.setAttribute("aria-valuetext", shown.textContent);
    };
    input.addEventListener("input", () => {
      const value = values[Number(input.value)];
      if (option) state.options[option] = value;
      else state.turn = (value * Math.PI) / 180;
      draw();
    });
    return { row, input, show };
  }

  // --- drawing: elements are made once a scene, and moved

  let marks = [];
  let axes = {};
  function rebuild() {
    scenes.value = state.scene;
    spaces.value = state.space === "sphere" ? 1 : 0;
    about.textContent = SCENES[state.scene].text;
    stage.textContent = "";
    make("circle", { r: RADIUS, class: "hcl-line" }, stage);
    axes.grid = state.space === "sphere" ? [0, 1, 2].map(() => make("path", { class: "hcl-grid" }, stage)) : [];
    turning.row.hidden = state.space !== "sphere";
    chart.textContent = "";
    frame();
    const arrows = make("g", { "aria-hidden": "true" }, stage);
    marks = state.points.map((point, k) => {
      const group = make("g", { tabindex: 0, role: "slider", class: `hcl-point ${kind(point, k)}`, "aria-label": point.name }, stage);
      make("circle", { r: 22, class: "hcl-hit" }, group);
      const shape = k > 1 && point.same ? make("rect", {}, group) : make("circle", {}, group);
      if (k < 2) make("text", { "text-anchor": "middle" }, group, point.name);
      group.addEventListener("pointerdown", (event) => grab(event, group, point));
      group.addEventListener("keydown", (event) => {
        if (!event.key.startsWith("Arrow")) return;
        event.preventDefault();
        nudge(point, event.key, event.shiftKey ? STEP / 5 : STEP);
        draw();
      });
      const stems = k < 2 ? [] : ["hcl-weight", "hcl-slope"].map((name) => {
        const stem = make("g", { class: `${name} ${kind(point, k)}` }, chart);
        make("line", {}, stem);
        make(point.same ? "rect" : "circle", point.same ? { width: 8, height: 8 } : { r: 4 }, stem);
        return stem;
      });
      return { group, shape, stems, path: make("path", { class: "hcl-arrow" }, arrows) };
    });
    draw();
  }
  const kind = (point, k) => (k === 0 ? "hcl-anchor" : k === 1 ? "hcl-positive" : point.same ? "hcl-same" : "hcl-other");

  const [LEFT, RIGHT, TOP, BASE, ZERO, HALF] = [44, 312, 24, 96, 180, 44];
  function frame() {
    make("text", { x: LEFT, y: 12 }, chart, "weight q");
    make("line", { x1: LEFT, x2: RIGHT, y1: BASE, y2: BASE, class: "hcl-line" }, chart);
    for (const [y, text] of [[TOP, "1"], [BASE, "0"]]) make("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, chart, text);
    const alike = BASE - (BASE - TOP) / (state.points.length - 2);
    make("line", { x1: LEFT, x2: RIGHT, y1: alike, y2: alike, class: "hcl-grid" }, chart);
    make("text", { x: LEFT, y: ZERO - HALF - 12 }, chart, "derivative of the loss: above 0 pushed away");
    make("line", { x1: LEFT, x2: RIGHT, y1: ZERO, y2: ZERO, class: "hcl-line" }, chart);
    make("text", { x: LEFT - 6, y: ZERO + 4, "text-anchor": "end" }, chart, "0");
    axes.most = make("text", { x: LEFT - 6, y: ZERO - HALF + 4, "text-anchor": "end" }, chart);
    for (const c of [-1, 0, 1]) {
      make("text", { x: across(c), y: 244, "text-anchor": "middle" }, chart, c === 0 ? "cosine 0" : number(c));
    }
  }
  const across = (cosine) => LEFT + 8 + ((RIGHT - LEFT - 16) * (Math.min(1, Math.max(-1, cosine)) + 1)) / 2;

  function compute() {
    const [z, positive, ...negatives] = state.points.map((point) => point.v);
    return window.hclWeights.forces(z, positive, negatives, state.options);
  }

  function draw() {
    const start = performance.now();
    const found = compute();
    const pushes = [found.onAnchor, found.onPositive, ...found.onNegatives];
    const longest = Math.max(...pushes.map((f) => Math.hypot(...f)));
    state.points.forEach((point, k) => drawPoint(point, k, found, arrow(pushes[k], longest)));
    drawGrid();
    drawStems(found);
    for (const [name, { show }] of Object.entries(sliders)) show(state.options[name]);
    turning.show(Math.round((state.turn * 180) / Math.PI));
    attached.checked = !state.options.detach;
    debias.value = DEBIAS.indexOf(state.options.debias);
    if (details.open) fill(found);
    api.found = found;
    api.cost = performance.now() - start;
    say(found, longest);
  }
  /* A force as it is drawn: its length grows with the square root, so that small ones are seen. */
  function arrow(push, longest) {
    const size = Math.hypot(...push);
    const scale = size > 0 ? (LONGEST / RADIUS) * Math.sqrt(size / longest) / size : 0;
    return push.map((x) => scale * x);
  }
  function drawPoint(point, k, found, push) {
    const { group, shape, path } = marks[k];
    const view = seen(point.v);
    const [x, y] = place(view);
    const weight = k < 2 ? 0.2 : found.q[k - 2];
    const r = Math.sqrt(16 + 300 * weight); // the area grows with the weight
    set(group, { transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})`, opacity: view[2] < -1e-9 ? 0.45 : 1 });
    set(shape, shape.tagName === "rect" ? { x: -0.89 * r, y: -0.89 * r, width: 1.77 * r, height: 1.77 * r } : { r });
    if (k < 2) {
      const out = k === 0 ? -26 / RADIUS : 24 / RADIUS; // the anchor's name inside, the positive's outside
      set(group.lastChild, { x: out * x, y: out * y + 4 });
    }
    const tip = place(seen(plus(point.v, push)));
    path.setAttribute("d", arrowPath([x, y], tip));
    const closer = k > 1 && found.ds[k - 2] < 0;
    path.setAttribute("class", `hcl-arrow ${closer ? "hcl-closer" : k > 1 ? "hcl-away" : ""}`);
    const words = k === 0 ? "" : `cosine ${number(found.cosines[k - 1])}`;
    const more = k < 2 ? "" : `, weight ${percent(found.q[k - 2])}${closer ? ", pulled closer" : ""}`;
    const clock = Math.round((Math.atan2(point.v[0], point.v[1]) * 180) / Math.PI + 360) % 360;
    set(group, { "aria-valuemin": 0, "aria-valuemax": 360, "aria-valuenow": clock, "aria-valuetext": `${clock} degrees${words ? ", " : ""}${words}${more}` });
  }
  function arrowPath([x, y], [X, Y]) {
    const length = Math.hypot(X - x, Y - y);
    if (length < 1) return "";
    const [a, b] = [(X - x) / length, (Y - y) / length];
    const head = Math.min(7, length);
    const [u, v] = [X - head * a, Y - head * b];
    return `M${x} ${y}L${X} ${Y}M${u - 0.6 * head * b} ${v + 0.6 * head * a}L${X} ${Y}L${u + 0.6 * head * b} ${v - 0.6 * head * a}`;
  }
  /* The equator and two meridians, as seen. */
  function drawGrid() {
    const turns = Array.from({ length: 49 }, (_, k) => (k * Math.PI) / 24);
    const circles = [(a) => [Math.cos(a), 0, Math.sin(a)], (a) => [Math.cos(a), Math.sin(a), 0], (a) => [0, Math.cos(a), Math.sin(a)]];
    axes.grid.forEach((path, k) => {
      const line = turns.map((a) => place(seen(circles[k](a))).map((x) => x.toFixed(1)).join(" "));
      path.setAttribute("d", `M${line.join("L")}`);
    });
  }
  function drawStems({ cosines, q, ds }) {
    const most = Math.max(...ds.map(Math.abs), 1e-12);
    axes.most.textContent = most > 1e-11 ? number(Number(most.toPrecision(2))) : "";
    q.forEach((weight, j) => {
      const x = across(cosines[j + 1]);
      const ends = [[BASE, BASE - weight * (BASE - TOP)], [ZERO, ZERO - (ds[j] / most) * HALF]];
      marks[j + 2].stems.forEach((stem, k) => {
        const [from, to] = ends[k];
        set(stem.firstChild, { x1: x, x2: x, y1: from, y2: to });
        set(stem.lastChild, stem.lastChild.tagName === "rect" ? { x: x - 4, y: to - 4 } : { cx: x, cy: to });
      });
    });
  }
  function fill({ cosines, q, ds }) {
    table.textContent = "";
    const head = make("tr", {}, make("thead", {}, table));
    for (const name of ["negative", "class", "cosine", "weight q", "derivative"]) make("th", { scope: "col" }, head, name);
    const body = make("tbody", {}, table);
    q.forEach((weight, j) => {
      const row = make("tr", {}, body);
      make("th", { scope: "row" }, row, String(j + 1));
      const cells = [state.points[j + 2].same ? "the anchor's" : "another", number(cosines[j + 1]), percent(weight), number(ds[j])];
      for (const cell of cells) make("td", {}, row, cell);
    });
  }

  /* The sentence that is read out: at most four times a second, and always the last one. */
  let due = 0;
  let told = 0;
  function say(found, longest) {
    clearTimeout(due);
    due = setTimeout(() => {
      told = performance.now();
      readout.textContent = sentence(found, longest);
    }, Math.max(0, 250 - (performance.now() - told)));
  }
  function sentence({ q, logNg, loss, clamped, ds }, longest) {
    const same = state.points.slice(2).reduce((sum, point, j) => sum + (point.same ? q[j] : 0), 0);
    const closer = ds.filter((d) => d < 0).length;
    return [
      `Loss ${number(loss)}.`,
      `Ng ${number(Math.exp(logNg))}, clamp ${clamped ? "active" : "not active"}.`,
      `Weight on negatives of the anchor's class ${percent(same)}.`,
      `Pulled closer: ${closer} of ${q.length} negatives.`,
      longest > 0 ? `The longest arrow is a force of ${number(longest)}.` : "No force.",
    ].join(" ");
  }

  /* A small step of gradient descent for all points at once; none turns by more than ten degrees. */
  function follow() {
    const found = compute();
    const pushes = [found.onAnchor, found.onPositive, ...found.onNegatives];
    const longest = Math.max(...pushes.map((f) => Math.hypot(...f)));
    const size = Math.min(0.2, 0.17 / Math.max(longest, 1e-9));
    state.points.forEach((point, k) => { point.v = normalised(plus(point.v, pushes[k], size)); });
    draw();
  }

  // --- the pointer

  function grab(event, group, point) {
    event.preventDefault();
    group.focus();
    group.setPointerCapture(event.pointerId);
    const move = (to) => {
      const at = new DOMPoint(to.clientX, to.clientY).matrixTransform(stage.getScreenCTM().inverse());
      drag(point, at.x / RADIUS, -at.y / RADIUS);
      draw();
    };
    const drop = () => {
      group.removeEventListener("pointermove", move);
      for (const name of ["pointerup", "pointercancel"]) group.removeEventListener(name, drop);
    };
    group.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) group.addEventListener(name, drop);
  }

  const api = { state, draw, load, drag, cost: 0, found: null };
  window.hclTouch = api;
  load(0);
  rebuild();
})();
