// Sample videos: a row a prompt; the slider chooses the look that the students' columns show.

const blobs = new Map();

/** An address of the page's video of that number, made at its first use. */
function address(number) {
  if (!blobs.has(number)) {
    const bytes = Uint8Array.from(atob(data.videos[number]), (letter) => letter.charCodeAt(0));
    blobs.set(number, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
  }
  return blobs.get(number);
}

/** The newest look of a run at a step or before it, else its first. */
function lookAt(looks, step) {
  const steps = Object.keys(looks).map(Number);
  return steps.filter((one) => one <= step).at(-1) ?? steps[0];
}

class Samples {
  constructor(samples) {
    this.samples = samples;
    this.step = samples.steps.at(-1);
    this.weights = null;
    this.playing = true;
    this.moving = []; // cells whose video the slider changes
    const columns = this.columns = Object.keys(samples.fixed).length + samples.looks.length;
    this.watch = new IntersectionObserver((entries) => entries.forEach((entry) => {
      entry.target.inView = entry.isIntersecting;
      this.run(entry.target);
    }));
    this.rows = el("div", { class: "rows" }, ...samples.prompts.map((prompt, row) => this.row(prompt, row)));
    this.rows.style.setProperty("--row", `${Math.max(300, 118 * columns)}px`);
    this.rows.style.setProperty("--wide", Math.min(columns, 6));
    this.rows.style.setProperty("--narrow", columns > 3 ? 2 : columns);
    this.node = el("div", {}, this.controls(), this.rows);
    this.change();
  }

  row(prompt, row) {
    const fixed = Object.entries(this.samples.fixed).map(([name, numbers]) => this.cell(name, numbers[row]));
    const moving = this.samples.looks.map((looks, run) => {
      const cell = this.cell("", null);
      cell.classList.add("student");
      this.moving.push({ cell, looks, run, row });
      return cell;
    });
    const card = el("article", { class: "card row" }, el("h3", {}, prompt), el("div", { class: "cells" }, ...fixed, ...moving));
    card.prepend(el("button", {
      title: "Larger or smaller", "aria-label": "Larger or smaller", onclick: () => card.classList.toggle("large"),
    }, "⤢"));
    return card;
  }

  cell(title, number) {
    const video = el("video", { muted: true, loop: true, playsinline: true, preload: "auto" });
    video.muted = true; // the attribute alone mutes only what the parser makes
    video.addEventListener("loadedmetadata", () => {
      video.classList.toggle("small", video.videoWidth < 160);
      if (video.videoWidth >= 320) this.rows.style.setProperty("--row", `${230 * this.columns}px`);
    });
    video.addEventListener("loadeddata", () => this.together());
    this.watch.observe(video);
    const cell = el("figure", {}, video, el("div", { class: "blank", hidden: true }, "not shown"), el("figcaption", {}, title));
    if (number !== null) video.src = address(number);
    return cell;
  }

  /** All videos from their first frame, so that what stands side by side moves as one. */
  together() {
    cancelAnimationFrame(this.soon);
    this.soon = requestAnimationFrame(() => this.rows.querySelectorAll("video").forEach((video) => {
      if (video.readyState) video.currentTime = 0;
      this.run(video);
    }));
  }

  run(video) {
    if (this.playing && video.inView && video.src) video.play().catch(() => {}); // a browser may refuse: then it stands still
    else video.pause();
  }

  controls() {
    const { steps, looks } = this.samples;
    const said = el("output", { id: "step" });
    const slider = el("input", {
      id: "slider", type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1, "aria-label": "Step of the samples",
      oninput: () => { this.step = steps[slider.value]; this.change(); },
    });
    const by = (change) => () => {
      slider.value = Number(slider.value) + change;
      slider.dispatchEvent(new Event("input"));
    };
    this.say = () => {
      said.textContent = `step ${this.step.toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", said.textContent);
    };
    const play = el("button", { onclick: () => {
      this.playing = !this.playing;
      play.textContent = this.playing ? "Pause" : "Play";
      this.rows.querySelectorAll("video").forEach((video) => this.run(video));
    } }, "Pause");
    const bar = el("div", { class: "bar stick" }, said,
      el("span", { class: "group wide" }, el("button", { onclick: by(-1), "aria-label": "Earlier look" }, "‹"), slider,
        el("button", { onclick: by(1), "aria-label": "Later look" }, "›")));
    const first = looks.find((one) => Object.keys(one).length);
    const names = first ? Object.keys(Object.values(first)[0]) : [];
    this.weights = names[0];
    if (looks.length === 1 && names.length > 1) bar.append(this.choice(names));
    bar.append(play);
    return bar;
  }

  choice(names) {
    const titles = { ema: "Average", trained: "Trained weights" };
    const buttons = names.map((name) => el("button", { "aria-pressed": String(name === this.weights), onclick: () => {
      this.weights = name;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", names[i] === name));
      this.change();
    } }, titles[name]));
    return el("span", { class: "choice", role: "group", "aria-label": "Weights" }, ...buttons);
  }

  change() {
    this.say();
    for (const { cell, looks, run, row } of this.moving) {
      const step = lookAt(looks, this.step), [video, blank, caption] = cell.children;
      const byWeights = step === undefined ? {} : looks[step];
      const number = (byWeights[this.weights] ?? Object.values(byWeights)[0])?.[row] ?? null;
      video.hidden = number === null;
      blank.hidden = number !== null;
      if (number !== null && video.src !== address(number)) video.src = address(number);
      const name = this.samples.looks.length > 1 ? data.runs[run].name : "student";
      caption.textContent = step === undefined ? name : `${name}, step ${step.toLocaleString("en")}`;
    }
  }
}
