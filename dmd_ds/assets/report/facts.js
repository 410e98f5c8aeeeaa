// Tables and bars: numbers at a glance, memory, warnings, machines, recipes.

function tilesOf(run) {
  return el("div", { class: "tiles" }, ...run.tiles.map((tile) => el(
    "div", { class: `card tile ${tile.state ?? ""}` },
    el("div", { class: "label" }, tile.label), el("div", { class: "value" }, tile.value), el("div", { class: "note" }, tile.note),
  )));
}

/** A line a run; on a narrow screen a card a run. */
function runsTable(runs) {
  const labels = [...new Set(runs.flatMap((run) => run.tiles.map((tile) => tile.label)))];
  const rows = runs.map((run, number) => {
    const cells = labels.map((label) => {
      const tile = run.tiles.find((one) => one.label === label);
      return el("td", { "data-label": label, class: tile?.state ?? "" }, tile ? tile.value : "–");
    });
    return el("tr", {}, el("th", { scope: "row" }, el("span", { class: "dot", ink: ink(number) }), run.name), ...cells);
  });
  const head = el("thead", {}, el("tr", {}, ...["Run", ...labels].map((label) => el("th", { scope: "col" }, label))));
  return el("div", { class: "card" }, el("table", { class: "stack" }, head, el("tbody", {}, ...rows)));
}

function differencesTable(runs, rows) {
  const body = rows.map(([key, ...values]) => el(
    "tr", {}, el("th", { scope: "row" }, key), ...values.map((value, i) => el("td", { "data-label": runs[i].name }, value)),
  ));
  const head = el("thead", {}, el("tr", {}, ...["Key", ...runs.map((run) => run.name)].map((label) => el("th", { scope: "col" }, label))));
  return el("div", { class: "card" }, el("table", { class: "stack" }, head, el("tbody", {}, ...body)));
}

/** The plan by cause as one bar, what was measured below it, both on one scale. */
function memoryCard(memory) {
  const parts = [...Object.entries(memory.always), ...Object.entries(memory.peak)].sort((one, other) => other[1] - one[1]);
  const planned = parts.reduce((sum, [, size]) => sum + size, 0);
  const most = Math.max(planned, memory.measured, memory.device ?? 0);
  const gb = (size) => `${written(Number(size.toPrecision(3)))} GB`;
  const bar = (name, pieces, size) => [
    el("span", { class: "muted" }, name),
    el("div", { class: "track", role: "img", "aria-label": `${name} ${gb(size)}` }, ...pieces.map(([title, part, color]) => {
      const piece = el("i", { title: `${title}: ${gb(part)}`, ink: color });
      piece.style.width = `${(100 * part) / most}%`;
      return piece;
    })),
    el("strong", {}, gb(size)),
  ];
  const large = parts.filter(([, size]) => size >= 0.02 * planned);
  const rest = planned - large.reduce((sum, [, size]) => sum + size, 0);
  const shown = [...large, ...(rest > 1e-9 ? [[`${parts.length - large.length} smaller ones`, rest]] : [])];
  const colored = shown.map(([name, size], i) => [name, size, i === large.length ? "var(--c7)" : `color-mix(in srgb, ${ink(i % 7)} ${i < 7 ? 100 : 60}%, var(--card))`]);
  const scale = el(
    "div", { class: "scale" },
    ...bar("Planned", colored, planned), ...bar("Measured", [["measured", memory.measured, "var(--text)"]], memory.measured),
    ...(memory.device ? bar("Device", [["device", memory.device, "var(--line)"]], memory.device) : []),
  );
  const legend = el("ul", { class: "parts" }, ...colored.map(([name, size, color]) => el(
    "li", {}, el("span", { class: "dot", ink: color }), el("span", {}, name), el("span", { class: "muted" }, gb(size)),
  )));
  return el("div", { class: "card memory" }, scale, legend, el("p", { class: "note" }, `Planned peak: ${memory.phase}. ${memory.note}`));
}

function warningsCard(warnings) {
  if (!warnings.length) return el("div", { class: "card quiet" }, el("span", { class: "badge good" }, "None"), " Nothing left its band, no update was skipped.");
  const rows = warnings.toReversed().map(([step, text]) => el("tr", {}, el("td", {}, `step ${step.toLocaleString("en")}`), el("td", {}, text)));
  const body = el("tbody", {}, ...rows.slice(0, 12));
  const card = el("div", { class: "card warnings" }, el("table", {}, body));
  if (rows.length > 12) {
    const more = el("button", { class: "more", onclick: () => { body.append(...rows.slice(12)); more.remove(); } }, `Show all ${rows.length}`);
    card.append(more);
  }
  return card;
}

function factsTables(facts) {
  return el("div", { class: "pair" }, ...Object.entries(facts).map(([title, rows]) => el(
    "div", { class: "card facts" },
    el("table", { "aria-label": title }, el("tbody", {}, ...rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value))))),
  )));
}

function recipeCard(run, open) {
  return el("details", { class: "card", open }, el("summary", {}, open ? "recipe.yaml" : run.name), el("pre", {}, run.recipe));
}
