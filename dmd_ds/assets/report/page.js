// Lays the page out from its data.

const data = JSON.parse(document.getElementById("data").textContent);

function perRun(make) {
  return data.runs.map(make).filter(Boolean);
}

/** One run's own, or each run's under its name. */
function ofEach(make) {
  const several = data.runs.length > 1;
  return perRun((run, number) => {
    const node = make(run);
    return node && several ? el("div", { class: "of" }, el("h3", {}, el("span", { class: "dot", ink: ink(number) }), run.name), node) : node;
  });
}

function layOut() {
  const { runs } = data, alone = runs.length === 1;
  document.getElementById("title").textContent = alone ? runs[0].name : `${runs.length} runs compared`;
  const state = (run) => (run.is_done ? "finished" : "not finished");
  document.getElementById("about").textContent = alone ? `${state(runs[0])} · ${runs[0].folder}` : runs.map((run) => run.name).join(" · ");
  document.getElementById("made").textContent = `Made by ${data.made}.`;

  section("Summary", "", alone ? tilesOf(runs[0]) : runsTable(runs));
  if (data.differences.length) section("Differences", "Keys of the recipes that are not the same.", differencesTable(runs, data.differences));
  if (data.samples) {
    const note = "The same prompts and noise at every look, and for every column." + (data.samples.left_out ? ` ${data.samples.left_out}` : "");
    section("Samples", note, new Samples(data.samples).node);
  }
  if (data.groups.length) {
    const steps = data.groups.flatMap((group) => group.panels).flatMap((panel) => panel.series).flatMap((one) => [one.x[0], one.x.at(-1)]);
    view.all = view.steps = [Math.min(...steps), Math.max(Math.max(...steps), Math.min(...steps) + 1)];
    const groups = data.groups.map((group) => el(
      "div", { class: "of" }, el("h3", {}, group.title), el("p", { class: "note" }, group.note),
      el("div", { class: "charts" }, ...group.panels.map((panel) => new Chart(panel).node)),
    ));
    section("Curves", "Point at a curve for its numbers; drag over steps to see them closer, in all charts.", chartControls(), ...groups);
    redraw();
  }
  const memory = ofEach((run) => run.memory && memoryCard(run.memory));
  if (memory.length) section("Memory", "Of the fullest rank: what was planned before the start, by cause, and what it came to.", ...memory);
  section("Warnings", "", ...ofEach((run) => warningsCard(run.warnings)));
  const machines = ofEach((run) => Object.keys(run.facts).length && factsTables(run.facts));
  if (machines.length) section("Machine", "", ...machines);
  section("Recipe", "", ...runs.map((run) => recipeCard(run, alone)));
}

layOut();
