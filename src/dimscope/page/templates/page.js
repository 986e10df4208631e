"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const FEW = 25;      // hits that are zoomed to and named on the map
  const LISTED = 60;   // hits listed under the search box
  const drawn = new Map();  // figure id -> {div, data, layout}

  // ---- columns ---------------------------------------------------------------------------------------------------

  function bytes(base64) {
    const text = atob(base64);
    const out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out.buffer;
  }

  /** Unpack the page's data: gzipped JSON in base64, read without any request. */
  function unpack(element) {
    const stream = new Blob([bytes(element.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function floats(column) {
    const codes = new Uint16Array(bytes(column.codes));
    const out = new Float32Array(codes.length);
    for (let i = 0; i < codes.length; i++) out[i] = codes[i] === 65535 ? NaN : column.low + column.step * codes[i];
    return out;
  }

  function openTokens(source) {
    const count = source.label.length;
    const ids = source.ids ? new Int32Array(bytes(source.ids)) : Int32Array.from({ length: count }, (_, i) => i);
    const rowOf = new Map();
    if (source.ids) ids.forEach((id, row) => rowOf.set(id, row));
    const category = new Uint8Array(bytes(source.category));
    const rows = source.categories.map(() => []);
    category.forEach((code, row) => rows[code].push(row));
    const cache = new Map([["id", ids]]);
    const column = (name) => {
      if (!cache.has(name)) cache.set(name, floats(source.floats[name]));
      return cache.get(name);
    };
    return {
      count, ids, column,
      label: source.label,
      lower: source.label.map((label) => label.toLowerCase()),
      names: Object.keys(source.floats),
      reason: (row) => source.reason[ids[row]],
      category: (row) => source.categories[category[row]],
      row: (id) => (source.ids ? rowOf.get(id) : id >= 0 && id < count ? id : undefined),
      rows: (name) => rows[source.categories.indexOf(name)],
    };
  }

  function openNeighbours(source) {
    const ids = new Int32Array(bytes(source.ids));
    const neighbours = new Int32Array(bytes(source.neighbours));
    const cosine = floats(source.cosine);
    const place = new Map();
    ids.forEach((id, i) => place.set(id, i));
    const of = (id) => {
      const start = place.get(id) * source.k;
      return Array.from({ length: source.k }, (_, i) => ({ id: neighbours[start + i], cosine: cosine[start + i] }))
        .filter((entry) => entry.id >= 0);
    };
    return { count: ids.length, has: (id) => place.has(id), of };
  }

  if (!("DecompressionStream" in window)) {
    byId("trouble").textContent = "The figures need a browser from 2023 or later; the text and the tables do not.";
    byId("trouble").hidden = false;
    return;
  }
  const payload = await unpack(byId("payload"));
  const tokens = payload.tokens ? openTokens(payload.tokens) : null;
  const knn = payload.knn ? openNeighbours(payload.knn) : null;

  // Plotly reads <b> or <a href> inside a text as markup; a label must never act as such.
  const plain = (label) => label.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const gather = (column, rows) => Float32Array.from(rows, (row) => column[row]);

  /** Fill a trace that names its columns in meta from the token columns. */
  function fill(trace) {
    const rows = tokens.rows(trace.meta.category);
    const ids = Int32Array.from(rows, (row) => tokens.ids[row]);
    return Object.assign(trace, {
      x: gather(tokens.column(trace.meta.x), rows),
      y: gather(tokens.column(trace.meta.y), rows),
      text: rows.map((row) => plain(tokens.label[row])),
      customdata: ids,
    });
  }

  // ---- figures and theme -----------------------------------------------------------------------------------------

  const theme = () => document.documentElement.dataset.theme;
  const touch = matchMedia("(pointer: coarse)").matches;
  // Where nothing hovers the buttons would always be there, over the legend.
  const displayModeBar = matchMedia("(hover: hover)").matches ? "hover" : false;
  const config = {
    displaylogo: false, displayModeBar, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    showSendToCloud: false, plotlyServerURL: "",  // a click must not upload a figure
  };

  function layoutFor(id, layout) {
    const out = { ...layout, autosize: true, template: payload.templates[theme()] };
    // A finger that drags over a figure wants to scroll the page; only the map is for dragging.
    const place = byId(id);
    // A square figure on a narrow page would stand in a tall empty box.
    if (place.classList.contains("square")) out.height = Math.min(layout.height, place.clientWidth * 0.9 + 20);
    if (touch && id !== "token-map") out.dragmode = false;
    return out;
  }

  async function draw(id, spec) {
    const data = spec.data.map((trace) => (trace.meta && trace.meta.category ? fill(trace) : trace));
    const div = byId(id);
    const layout = layoutFor(id, spec.layout);
    await Plotly.newPlot(div, data, layout, config);
    drawn.set(id, { div, data, layout });
  }

  const pause = () => new Promise((done) => setTimeout(done, 0));
  const distance = ({ div }) => Math.abs(div.getBoundingClientRect().top - innerHeight / 3);

  /** Give every figure the colours of the theme, nearest to the reader first, without freezing the page. */
  async function retheme(extra = {}) {
    for (const { div } of [...drawn.values()].sort((a, b) => distance(a) - distance(b))) {
      Plotly.relayout(div, { template: payload.templates[theme()], ...extra });
      await pause();
    }
  }

  function switchTheme() {
    const name = theme() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = name;
    try { localStorage.setItem("dimscope-theme", name); } catch { /* storage may be closed for local files */ }
    retheme();
  }

  function switchScale(button) {
    const { div, layout } = drawn.get(button.dataset.figure);
    const type = layout.yaxis.type === "log" ? "linear" : "log";
    layout.yaxis.type = type;
    button.textContent = type === "log" ? "Linear scale" : "Log scale";
    Plotly.relayout(div, { "yaxis.type": type, "yaxis.autorange": true, "yaxis.tickmode": type === "log" ? "array" : "auto" });
  }

  /** Show the traces of the chosen layer in every figure of the section; traces that belong to no layer stay. */
  function switchLayer(select) {
    for (const place of byId(select.dataset.layers).querySelectorAll(".plot")) {
      const { div, data } = drawn.get(place.id);
      const layers = data.map((trace) => trace.meta?.layer);
      const seen = layers.map((layer) => layer === undefined || String(layer) === select.value);
      Plotly.restyle(div, { visible: seen });
    }
  }

  /** Paper is white and narrow; the screen comes back afterwards. */
  function toPaper() {
    for (const { div } of drawn.values()) {
      const narrow = div.closest(".three") ? 225 : 690;
      Plotly.relayout(div, { template: payload.templates.light, width: Math.min(div.clientWidth || narrow, narrow) });
    }
    document.documentElement.dataset.screenTheme = theme();
    document.documentElement.dataset.theme = "light";
  }

  function toScreen() {
    document.documentElement.dataset.theme = document.documentElement.dataset.screenTheme;
    retheme({ width: null, autosize: true });
  }

  // ---- the token map ---------------------------------------------------------------------------------------------

  const view = { x: "pc1", y: "pc2", colour: "category", hits: [], picked: null, revision: 0, zoom: null };

  function mapTraces(base) {
    const traces = base.data.map((trace) => {
      const rows = tokens.rows(trace.meta.category);
      const filled = view.x === trace.meta.x && view.y === trace.meta.y ? { ...trace } : fill({
        ...trace, meta: { ...trace.meta, x: view.x, y: view.y },
      });
      const marker = { ...trace.marker };
      if (view.colour === "norm") {
        marker.color = gather(tokens.column("norm"), rows);
        marker.coloraxis = "coloraxis";
      }
      return { ...filled, marker, showlegend: view.colour === "category" };
    });
    const near = view.picked !== null && knn && knn.has(view.picked) ? knn.of(view.picked).map((n) => tokens.row(n.id)) : [];
    const rings = [
      ring("found", view.hits, 12),
      ring("neighbours", near.filter((row) => row !== undefined), 14),
      ring("chosen", view.picked === null ? [] : [tokens.row(view.picked)], 18),
    ];
    return traces.concat(rings.filter((trace) => trace.x.length));
  }

  function ring(name, rows, size) {
    return {
      type: "scattergl", mode: "markers", name: `${name} (${rows.length.toLocaleString("en")})`,
      x: gather(tokens.column(view.x), rows),
      y: gather(tokens.column(view.y), rows),
      text: rows.map((row) => plain(tokens.label[row])),
      customdata: Int32Array.from(rows, (row) => tokens.ids[row]),
      hovertemplate: "<b>%{text}</b><br>#%{customdata}<extra></extra>",
      marker: { symbol: "circle-open", size, color: payload.marks.highlight, line: { width: 2 } },
    };
  }

  function notes() {
    const rows = view.hits.length <= FEW ? view.hits.slice(0, 12) : [];
    const named = new Set(rows);
    if (view.picked !== null) named.add(tokens.row(view.picked));
    const ground = getComputedStyle(document.documentElement).getPropertyValue("--panel");
    const [x, y] = [tokens.column(view.x), tokens.column(view.y)];
    const mean = (column) => [...named].reduce((sum, row) => sum + column[row], 0) / named.size;
    const [middleX, middleY] = [mean(x), mean(y)];
    return [...named].map((row, i) => {
      // Names point away from the middle of the hits; hits on one spot fan out around it.
      const spot = named.size === 1 || (x[row] === middleX && y[row] === middleY);
      const angle = spot ? i * 2.4 - 1.3 : Math.atan2(middleY - y[row], x[row] - middleX);
      return {
        x: x[row], y: y[row],
        text: plain(tokens.label[row].slice(0, 24)),
        ax: 46 * Math.cos(angle), ay: 46 * Math.sin(angle),
        arrowhead: 0, bgcolor: ground, borderpad: 2,
      };
    });
  }

  function frame(column, rows) {
    let low = Infinity, high = -Infinity;
    for (const row of rows) { low = Math.min(low, column[row]); high = Math.max(high, column[row]); }
    let all = 0;
    for (const value of column) all = Math.max(all, Math.abs(value) || 0);
    const room = Math.max(0.25 * (high - low), 0.08 * all);
    return [low - room, high + room];
  }

  function drawMap() {
    const base = drawn.get("token-map");
    const axis = (name, given) => {
      const component = view[name].slice(2);
      const share = payload.explained[component - 1];
      const text = `component ${component}` + (share === undefined ? "" : ` (${(100 * share).toFixed(1)}% of the variance)`);
      const range = view.zoom ? { range: frame(tokens.column(view[name]), view.zoom), autorange: false } : { autorange: true };
      return { ...given, title: { text }, ...range };
    };
    const layout = {
      ...base.layout,
      template: payload.templates[theme()],
      xaxis: axis("x", base.layout.xaxis), yaxis: axis("y", base.layout.yaxis),
      annotations: notes(),
      uirevision: view.revision,
    };
    return Plotly.react(base.div, mapTraces(base), layout, config);
  }

  function look(rows) {
    view.zoom = rows;
    view.revision += 1;
    return drawMap();
  }

  function chip(row, detail) {
    const button = document.createElement("button");
    const label = document.createElement("bdi");
    const small = document.createElement("small");
    button.type = "button";
    button.className = "chip";
    label.textContent = tokens.label[row];
    small.textContent = detail === undefined ? `#${tokens.ids[row]}` : detail;
    button.append(label, small);
    button.addEventListener("click", () => pick(tokens.ids[row]));
    return button;
  }

  function search(text) {
    const query = text.trim() === "" ? text.replace(/^\s+$/, (blank) => (blank.length ? "␣" : "")) : text;
    const id = /^#(\d+)$/.exec(query.trim());
    if (query === "") return [];
    if (id && tokens.row(Number(id[1])) !== undefined) return [tokens.row(Number(id[1]))];
    const span = /^#(\d+):(\d+)$/.exec(query.trim());  // a range of ids, its end not included, as in Python
    if (span) {
      const rows = [];
      for (let wanted = Number(span[1]); wanted < Math.min(Number(span[2]), tokens.lower.length); wanted += 1) {
        if (tokens.row(wanted) !== undefined) rows.push(tokens.row(wanted));
      }
      return rows;
    }
    const wanted = query.replace(/ /g, "␣").toLowerCase();
    const rows = [];
    tokens.lower.forEach((label, row) => { if (label.includes(wanted)) rows.push(row); });
    return rows;
  }

  function find(text) {
    view.hits = search(text);
    const n = view.hits.length;
    const count = n === 0 ? `No ${payload.row}` : n === 1 ? `1 ${payload.row}` : `${n.toLocaleString("en")} ${payload.row}s`;
    const listed = n > LISTED ? `, the first ${LISTED} are listed` : "";
    byId("found").textContent = text === "" ? "" : `${count} found${listed}.`;
    byId("hits").replaceChildren(...view.hits.slice(0, LISTED).map((row) => chip(row)));
    return look(n > 0 && n <= FEW ? view.hits : null);
  }

  function line(...parts) {
    const p = document.createElement("p");
    p.append(...parts);
    return p;
  }

  function code(text) {
    const element = document.createElement("code");
    element.textContent = text;
    return element;
  }

  function neighbourPart(id) {
    if (!knn) return [line(`No neighbours were computed for this page. For this ${payload.row} run `, code(`${payload.command} '#${id}'`))];
    if (!knn.has(id)) {
      const n = knn.count.toLocaleString("en");
      return [line(`Only a random sample of ${n} ${payload.row}s has precomputed neighbours, and this ${payload.row} is not in it. Run `,
        code(`${payload.command} '#${id}'`))];
    }
    const list = document.createElement("ol");
    for (const { id: other, cosine } of knn.of(id)) {
      const row = tokens.row(other);
      const item = document.createElement("li");
      const value = document.createElement("span");
      value.textContent = cosine.toFixed(3);
      item.append(row === undefined ? `#${other}` : chip(row), value);
      list.append(item);
    }
    const everyone = `computed for every ${payload.row}`;
    const sample = `computed for a sample of ${knn.count.toLocaleString("en")} ${payload.row}s`;
    const scope = knn.count === tokens.count ? everyone : sample;
    const note = line(`Nearest neighbours by cosine in all dimensions, ${scope}.`);
    note.className = "hint";
    return [list, note];
  }

  function describe(id) {
    const row = tokens.row(id);
    const title = document.createElement("h3");
    const label = document.createElement("bdi");
    label.textContent = tokens.label[row];
    title.append(label, ` #${id}`);
    const reason = tokens.reason(row);
    const facts = [line(tokens.category(row) + (reason ? `: ${reason}` : "")), line(`norm ${tokens.column("norm")[row].toPrecision(4)}`)];
    const score = tokens.column("untrained_score")[row];
    if (!Number.isNaN(score)) facts.push(line(`under-training score ${score.toFixed(2)} (0 untrained, 1 usual)`));
    byId("picked").replaceChildren(title, ...facts, ...neighbourPart(id));
  }

  function pick(id) {
    view.picked = id;
    describe(id);
    return drawMap();
  }

  function showAll() {
    byId("find").value = "";
    view.picked = null;
    byId("picked").replaceChildren(Object.assign(line(`Click a ${payload.row} to see its nearest neighbours.`), { className: "hint" }));
    return find("");
  }

  function csv() {
    const quote = (text) => (/[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
    const lines = [["id", "label", "category", ...tokens.names].join(",")];
    for (let row = 0; row < tokens.count; row++) {
      const numbers = tokens.names.map((name) => {
        const value = tokens.column(name)[row];
        return Number.isNaN(value) ? "" : String(Number(value.toPrecision(5)));
      });
      lines.push([tokens.ids[row], quote(tokens.label[row]), tokens.category(row), ...numbers].join(","));
    }
    // The mark at the start tells spreadsheets that the text is UTF-8.
    const url = URL.createObjectURL(new Blob(["\ufeff" + lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    Object.assign(document.createElement("a"), { href: url, download: "tokens.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  function startMap() {
    const base = drawn.get("token-map");
    let waiting = 0;
    base.div.on("plotly_click", (event) => pick(event.points[0].customdata));
    byId("find").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => find(event.target.value), 200);
    });
    byId("colour").addEventListener("change", (event) => { view.colour = event.target.value; drawMap(); });
    for (const axis of ["x", "y"]) {
      byId(`axis-${axis}`).addEventListener("change", (event) => {
        view[axis] = event.target.value;
        look(view.zoom);
      });
    }
    byId("reset").addEventListener("click", showAll);
    byId("csv")?.addEventListener("click", csv);
    for (const link of document.querySelectorAll("a[data-token]")) {
      link.addEventListener("click", () => {
        const id = Number(link.dataset.token);
        view.picked = id;
        describe(id);
        look([tokens.row(id)]);
      });
    }
  }

  // ---- start -----------------------------------------------------------------------------------------------------

  function followReading() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((a) => a.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-15% 0px -75% 0px" });
    document.querySelectorAll("main > section").forEach((section) => watcher.observe(section));
  }

  async function start() {
    byId("theme-toggle").addEventListener("click", switchTheme);
    document.querySelectorAll("button.scale").forEach((b) => b.addEventListener("click", () => switchScale(b)));
    for (const link of document.querySelectorAll("a[data-table]")) {
      const source = byId(`table-${link.dataset.table}`);
      if (source) link.href = source.href;
    }
    followReading();
    for (const [id, spec] of Object.entries(payload.figures)) {
      await draw(id, spec);
      await pause();
    }
    for (const select of document.querySelectorAll("select[data-layers]")) {
      select.addEventListener("change", () => switchLayer(select));
      if (!select.selectedOptions[0].defaultSelected) switchLayer(select);  // chosen while the figures were drawn
    }
    if (drawn.has("token-map")) startMap();
    addEventListener("beforeprint", toPaper);
    addEventListener("afterprint", toScreen);
    document.documentElement.dataset.ready = "true";
  }

  await start();
})();
