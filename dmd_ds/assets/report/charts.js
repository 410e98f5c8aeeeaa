// Curves in SVG. All charts of the page share the steps that are in view, the cursor and the smoothing.

const LEFT = 48, RIGHT = 8, TOP = 10, BOTTOM = 22, HEIGHT = 200;
const INSET = 5; // between the field's sides and the first and last step
const FEW = 40; // points up to which each is marked and nothing is smoothed

const view = { steps: [0, 1], all: [0, 1], smoothing: 0.6, logarithmic: false, charts: [], changed: () => {} };

function show(from, to) {
  const [first, last] = view.all;
  const width = Math.min(Math.max(to - from, Math.min(2, last - first)), last - first);
  const start = Math.min(Math.max(from, first), last - width);
  view.steps = [start, start + width];
  redraw();
}

function redraw() {
  view.charts.forEach((chart) => chart.draw());
  view.changed();
}

/** Round values that divide [low, high] into about `count` parts. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

/** Powers of ten in [low, high], with 2 and 5 between them where those are few. */
function logarithmicTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of high / low < 30 ? [1, 2, 5] : [1]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks(low, high, 3);
}

/** An exponential average without the bias of its beginning; gaps stay gaps. */
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

class Chart {
  constructor(panel) {
    this.panel = panel;
    this.svg = svg("svg", { role: "img", "aria-label": panel.title });
    this.tip = el("div", { class: "tip", hidden: true });
    const keys = panel.series.length > 1 ? panel.series.map((one) => el("span", { ink: ink(one.color) }, one.name)) : [];
    Object.keys(panel.levels).forEach((name) => {
      const key = el("span", { ink: this.levelInk(name) }, name);
      key.style.setProperty("--dash", "dashed");
      keys.push(key);
    });
    this.node = el("div", { class: "card chart" }, el("h3", {}, panel.title), el("div", { class: "legend" }, ...keys), this.svg, this.tip);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.svg);
    view.charts.push(this);
  }

  levelInk(name) {
    return name === "teacher" ? "var(--c2)" : "var(--c7)";
  }

  prepare() {
    const [from, to] = view.steps;
    this.curves = this.panel.series.map((one) => {
      const smooth = this.panel.smooth && one.x.length > FEW && view.smoothing > 0;
      const values = smooth ? smoothed(one.y, view.smoothing) : one.y;
      let first = one.x.findIndex((step) => step >= from);
      if (first < 0) first = one.x.length;
      let end = one.x.findLastIndex((step) => step <= to) + 1;
      return { ...one, smooth, values, first, end, inside: [Math.max(0, first - 1), Math.min(one.x.length, end + 1)] };
    });
    const seen = this.curves.flatMap((one) => [
      ...one.values.slice(one.first, one.end), ...(one.smooth ? ends(one.y.slice(one.first, one.end)) : []),
    ]);
    const { band, levels, limits } = this.panel;
    const values = [...seen, ...Object.values(levels), ...(band ?? []), ...(limits ?? [])].filter((value) => value !== null);
    this.logarithmic = view.logarithmic && !band && !limits && values.length > 0 && Math.min(...values) > 0;
    let low = values.length ? Math.min(...values) : 0, high = values.length ? Math.max(...values) : 1;
    if (this.logarithmic) {
      [low, high] = low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
    } else {
      const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
      [low, high] = [low >= 0 && low < (high - low) / 2 ? 0 : low - pad, high + pad];
    }
    [this.low, this.high] = [low, high];
    this.width = this.svg.clientWidth || 340;
  }

  x(step) {
    const [from, to] = view.steps;
    return LEFT + INSET + ((step - from) / (to - from)) * (this.width - LEFT - RIGHT - 2 * INSET);
  }

  y(value) {
    const at = this.logarithmic
      ? Math.log(value / this.low) / Math.log(this.high / this.low)
      : (value - this.low) / (this.high - this.low);
    return HEIGHT - BOTTOM - at * (HEIGHT - TOP - BOTTOM);
  }

  path(curve, values) {
    let text = "", pen = "M";
    for (let i = curve.inside[0]; i < curve.inside[1]; i++) {
      if (values[i] === null || (this.logarithmic && values[i] <= 0)) { pen = "M"; continue; }
      text += `${pen}${this.x(curve.x[i]).toFixed(1)},${this.y(values[i]).toFixed(1)}`;
      pen = "L";
    }
    return text;
  }

  draw() {
    this.prepare();
    const { width } = this, right = width - RIGHT, bottom = HEIGHT - BOTTOM, name = `clip${view.charts.indexOf(this)}`;
    const nodes = [];
    const clip = svg("clipPath", { id: name });
    clip.append(svg("rect", { x: LEFT, y: TOP - 4, width: Math.max(0, right - LEFT), height: bottom - TOP + 8 }));
    nodes.push(clip);
    const body = svg("g", { "clip-path": `url(#${name})` });
    if (this.panel.band) {
      const [top, base] = [this.y(this.panel.band[1]), this.y(this.panel.band[0])];
      body.append(svg("rect", { class: "band", x: LEFT, y: top, width: Math.max(0, right - LEFT), height: Math.max(0, base - top) }));
    }
    for (const value of this.logarithmic ? logarithmicTicks(this.low, this.high) : ticks(this.low, this.high, 4)) {
      nodes.push(svg("line", { class: "grid", x1: LEFT, x2: right, y1: this.y(value), y2: this.y(value) }));
      const label = svg("text", { x: LEFT - 7, y: this.y(value) + 4, "text-anchor": "end" });
      label.textContent = written(Math.abs(value) < 1e-12 ? 0 : value, this.panel.percent);
      nodes.push(label);
    }
    const marks = ticks(...view.steps, Math.max(3, Math.floor(width / 75))).filter(Number.isInteger);
    for (const step of marks) {
      const x = this.x(step);
      const label = svg("text", { x, y: HEIGHT - 6, "text-anchor": x > right - 16 ? "end" : "middle" });
      label.textContent = step.toLocaleString("en");
      nodes.push(label);
    }
    for (const [level, value] of Object.entries(this.panel.levels)) {
      body.append(svg("line", { class: "level", x1: LEFT, x2: right, y1: this.y(value), y2: this.y(value), ink: this.levelInk(level) }));
    }
    for (const curve of this.curves) {
      if (curve.smooth) body.append(svg("path", { class: "raw", d: this.path(curve, curve.y), ink: ink(curve.color) }));
      body.append(svg("path", { class: "curve", d: this.path(curve, curve.values), ink: ink(curve.color) }));
      if (curve.x.length <= FEW) {
        for (let i = curve.first; i < curve.end; i++) {
          if (curve.values[i] !== null) body.append(this.point(curve, i, 2.8));
        }
      }
    }
    this.cursor = svg("g");
    this.svg.replaceChildren(...nodes, body, this.cursor);
  }

  point(curve, i, r) {
    return svg("circle", { class: "point", cx: this.x(curve.x[i]), cy: this.y(curve.values[i]), r, ink: ink(curve.color) });
  }

  /** The cursor at a step: a line, the curves' nearest points; returns what they say. */
  pointAt(step) {
    const said = [], nodes = [];
    for (const curve of this.curves) {
      const i = nearest(curve.x, step);
      if (i < 0 || curve.x[i] < view.steps[0] || curve.x[i] > view.steps[1]) continue;
      if (curve.values[i] !== null) nodes.push(this.point(curve, i, 3.6));
      said.push([curve, curve.x[i], curve.y[i]]);
    }
    const x = said.length ? this.x(said[0][1]) : this.x(step);
    this.cursor.replaceChildren(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }), ...nodes);
    return [x, said];
  }

  explain(step) {
    const [x, said] = this.pointAt(step);
    if (!said.length) { this.tip.hidden = true; return; }
    const lines = said.map(([curve, , value]) => el("div", {}, `${said.length > 1 ? `${curve.name}: ` : ""}${written(value, this.panel.percent)}`));
    this.tip.replaceChildren(el("div", {}, `step ${said[0][1].toLocaleString("en")}`), ...lines);
    this.tip.hidden = false;
    const card = this.node.getBoundingClientRect(), field = this.svg.getBoundingClientRect();
    const own = this.tip.offsetWidth, at = x + field.left - card.left;
    this.tip.style.left = `${Math.max(4, at + 14 + own > card.width ? at - 14 - own : at + 14)}px`;
    this.tip.style.top = `${field.top - card.top + TOP}px`;
  }

  listen() {
    const stepAt = (event) => {
      const x = event.clientX - this.svg.getBoundingClientRect().left;
      const [from, to] = view.steps;
      return from + Math.min(1, Math.max(0, (x - LEFT - INSET) / (this.width - LEFT - RIGHT - 2 * INSET))) * (to - from);
    };
    let begin = null;
    this.svg.addEventListener("pointerdown", (event) => {
      begin = { step: stepAt(event), x: event.clientX };
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const step = stepAt(event);
      view.charts.forEach((chart) => chart !== this && chart.pointAt(step));
      this.explain(step);
      if (begin && Math.abs(event.clientX - begin.x) > 6) {
        const [a, b] = [this.x(begin.step), this.x(step)].sort((one, other) => one - other);
        this.cursor.append(svg("rect", { class: "select", x: a, y: TOP, width: b - a, height: HEIGHT - TOP - BOTTOM }));
      }
    });
    this.svg.addEventListener("pointerup", (event) => {
      const from = begin;
      begin = null;
      if (from && Math.abs(event.clientX - from.x) > 6) show(...[from.step, stepAt(event)].sort((one, other) => one - other));
    });
    const leave = () => {
      begin = null;
      this.tip.hidden = true;
      view.charts.forEach((chart) => chart.cursor && chart.cursor.replaceChildren());
    };
    this.svg.addEventListener("pointerleave", leave);
    this.svg.addEventListener("pointercancel", leave);
    this.svg.addEventListener("dblclick", () => show(...view.all));
  }
}

/** The place of the step that is nearest; -1 where there is none. */
function nearest(steps, step) {
  let best = -1;
  steps.forEach((one, i) => { if (best < 0 || Math.abs(one - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}

/** What of noisy values the axis has to hold: all but the outermost hundredths. */
function ends(values) {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  return sorted.length ? [sorted[Math.floor(0.01 * (sorted.length - 1))], sorted[Math.ceil(0.99 * (sorted.length - 1))]] : [];
}

function chartControls() {
  const range = el("output", { for: "zoom" });
  const zoom = (factor) => () => {
    const [from, to] = view.steps, middle = (from + to) / 2, half = ((to - from) / 2) * factor;
    show(middle - half, middle + half);
  };
  const move = (share) => () => show(view.steps[0] + share * (view.steps[1] - view.steps[0]), view.steps[1] + share * (view.steps[1] - view.steps[0]));
  const buttons = [
    el("button", { onclick: move(-0.5), title: "Earlier steps", "aria-label": "Earlier steps" }, "‹"),
    el("button", { onclick: zoom(0.5), title: "Closer", "aria-label": "Zoom in" }, "+"),
    el("button", { onclick: zoom(2), title: "Wider", "aria-label": "Zoom out" }, "−"),
    el("button", { onclick: move(0.5), title: "Later steps", "aria-label": "Later steps" }, "›"),
    el("button", { onclick: () => show(...view.all) }, "All steps"),
  ];
  view.changed = () => {
    const [from, to] = view.steps;
    range.textContent = `steps ${Math.ceil(from).toLocaleString("en")} to ${Math.floor(to).toLocaleString("en")}`;
    buttons[4].disabled = from === view.all[0] && to === view.all[1];
  };
  const smoothing = el("input", {
    type: "range", min: 0, max: 0.98, step: 0.02, value: view.smoothing, "aria-label": "Smoothing",
    oninput: (event) => { view.smoothing = Number(event.target.value); redraw(); },
  });
  const logarithmic = el("input", { type: "checkbox", onchange: (event) => { view.logarithmic = event.target.checked; redraw(); } });
  return el(
    "div", { class: "bar stick" },
    el("span", { class: "group", id: "zoom" }, ...buttons), range, el("label", {}, "Smoothing", smoothing), el("label", {}, logarithmic, "Logarithmic"),
  );
}
