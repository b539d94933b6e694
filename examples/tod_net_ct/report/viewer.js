// The case viewer: scroll through the slices, switch the image, lay errors and differences over it. No dependency.
"use strict";
(() => {
  const problems = [];
  addEventListener("error", (event) => problems.push(event.message));
  addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));

  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const byId = (id) => document.getElementById(id);
  const canvas = byId("slice"), context = canvas.getContext("2d");
  const slider = byId("viewer-z"), caseMenu = byId("viewer-case"), networkMenu = byId("viewer-network");
  const radios = byId("viewer-images"), text = byId("viewer-text");
  const shows = { outline: byId("show-outline"), errors: byId("show-errors"), difference: byId("show-difference") };
  const HIT = [0, 114, 178], MISSED = [213, 94, 0], FALSE_ALARM = [240, 228, 66], RANGE_HU = 150;
  const RED_BLUE = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];
  const small = document.createElement("canvas");  // one pixel per voxel; drawn large on the page's canvas
  let state = { shown: null, image: "normal_dose", z: 0 };

  async function unpack(packed, width) {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const values = new Uint8Array(await new Response(stream).arrayBuffer());
    for (let i = 0; i < values.length; i++) if (i % width) values[i] += values[i - 1];  // modulo 256, as it was packed
    return values;
  }

  async function choose(index) {
    const chosen = data.cases[index];
    if (!chosen.ready) {
      chosen.ready = Promise.all(chosen.images.map(async (image) => {
        image.greys = await unpack(image.grey, chosen.width);
        image.masks = await unpack(image.bits, chosen.width);
      }));
    }
    await chosen.ready;
    if (Number(caseMenu.value) !== index) return;  // another case was chosen meanwhile
    state.shown = chosen;
    slider.max = chosen.depth - 1;
    state.z = busiest(chosen);
    draw();
  }

  function busiest(chosen) {  // the slice that shows most of the organ
    const size = chosen.height * chosen.width, masks = chosen.images[0].masks;
    let best = Math.floor(chosen.depth / 2), most = 0;
    for (let z = 0; z < chosen.depth; z++) {
      let count = 0;
      for (let i = z * size; i < (z + 1) * size; i++) count += masks[i] & 1;
      if (count > most) { most = count; best = z; }
    }
    return best;
  }

  function colourOf(gapHu) {
    const place = (Math.max(-1, Math.min(1, gapHu / RANGE_HU)) + 1) * 2;
    const low = Math.min(3, Math.floor(place)), share = place - low;
    return RED_BLUE[low].map((value, i) => value + share * (RED_BLUE[low + 1][i] - value));
  }

  function draw() {
    const { shown, z } = state;
    if (!shown) return;
    const { width, height } = shown, start = z * width * height;
    const image = shown.images.find((one) => one.name === state.image) || shown.images[0];
    const normal = shown.images[0], network = Number(networkMenu.value) + 1;
    const pixels = new ImageData(width, height);
    let squares = 0, hits = 0, found = 0, truth = 0;
    for (let i = 0; i < width * height; i++) {
      const grey = image.greys[start + i], gapHu = (grey - normal.greys[start + i]) * 400 / 255;
      const isOrgan = image.masks[start + i] & 1, isFound = (image.masks[start + i] >> network) & 1;
      squares += gapHu * gapHu; hits += isOrgan & isFound; found += isFound; truth += isOrgan;
      let colour = shows.difference.checked ? colourOf(gapHu) : [grey, grey, grey];
      if (shows.errors.checked && (isOrgan || isFound)) {
        const over = isOrgan ? (isFound ? HIT : MISSED) : FALSE_ALARM, weight = isOrgan && isFound ? 0.4 : 0.75;
        colour = colour.map((value, c) => (1 - weight) * value + weight * over[c]);
      }
      pixels.data.set([colour[0], colour[1], colour[2], 255], 4 * i);
    }
    small.width = width; small.height = height;
    small.getContext("2d").putImageData(pixels, 0, 0);
    canvas.width = 640; canvas.height = Math.round(640 * shown.tall);
    context.imageSmoothingEnabled = true; context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (shows.outline.checked) outline(image.masks, start, width, height);
    slider.value = z;
    const place = `slice ${shown.slices[z] + 1} of ${shown.n_slices}`;
    const overlap = truth + found ? `, ${data.networks[network - 1]} Dice ${(200 * hits / (truth + found)).toFixed(1)} %` : "";
    const error = image === normal ? "" : `, RMSE ${Math.sqrt(squares / (width * height)).toFixed(1)} HU`;
    text.textContent = `${image.title}, ${place}; in this slice${error || ""}${overlap}`.replace("slice, ", "slice: ");
    if (!error && !overlap) text.textContent = `${image.title}, ${place}`;
    slider.setAttribute("aria-valuetext", place);
    canvas.setAttribute("aria-label", `${shown.name}: ${text.textContent}`);
    for (const radio of radios.querySelectorAll("input")) radio.checked = radio.value === image.name;
    byId("legend-errors").hidden = !shows.errors.checked;
    byId("legend-difference").hidden = !shows.difference.checked;
  }

  function outline(masks, start, width, height) {  // along the voxels' edges, as the mask has them
    const across = canvas.width / width, down = canvas.height / height;
    const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : masks[start + y * width + x] & 1);
    context.beginPath();
    for (let y = 0; y <= height; y++) {
      for (let x = 0; x <= width; x++) {
        const here = at(x, y);
        if (here !== at(x, y - 1)) { context.moveTo(x * across, y * down); context.lineTo((x + 1) * across, y * down); }
        if (here !== at(x - 1, y)) { context.moveTo(x * across, y * down); context.lineTo(x * across, (y + 1) * down); }
      }
    }
    for (const [colour, thickness] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour; context.lineWidth = thickness; context.lineCap = "square"; context.stroke();
    }
  }

  function goTo(z) {
    if (!state.shown) return false;
    const inside = Math.max(0, Math.min(state.shown.depth - 1, z)), moved = inside !== state.z;
    state.z = inside;
    if (moved) draw();
    return moved;
  }

  function nextImage(step) {
    const names = state.shown.images.map((image) => image.name);
    state.image = names[(names.indexOf(state.image) + step + names.length) % names.length];
    draw();
  }

  const keys = {
    ArrowUp: () => goTo(state.z + 1), ArrowDown: () => goTo(state.z - 1), Home: () => goTo(0), End: () => goTo(1e9),
    PageUp: () => goTo(state.z + 5), PageDown: () => goTo(state.z - 5),
    ArrowRight: () => nextImage(1), ArrowLeft: () => nextImage(-1),
  };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || !state.shown || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  canvas.addEventListener("wheel", (event) => {
    if (event.ctrlKey || !event.deltaY) return;  // a pinch
    if (goTo(state.z - Math.sign(event.deltaY))) event.preventDefault();  // at the last slice the page scrolls on
  }, { passive: false });
  slider.addEventListener("input", () => goTo(Number(slider.value)));
  caseMenu.addEventListener("change", () => choose(Number(caseMenu.value)));
  networkMenu.addEventListener("change", draw);
  radios.addEventListener("change", (event) => { state.image = event.target.value; draw(); });
  for (const box of Object.values(shows)) box.addEventListener("change", draw);

  async function selftest() {  // report.html#selftest: use every control, tell in attributes of <html> what happened
    const seen = () => context.getImageData(0, 0, canvas.width, canvas.height).data.reduce((a, b) => (31 * a + b) | 0, 7);
    const failed = [];
    const changes = (what, act) => { const before = seen(); act(); if (seen() === before) failed.push(what); };
    const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true, bubbles: true }));
    const set = (element, value) => { element.value = value; element.dispatchEvent(new Event("input")); };
    const click = (element) => element.click();
    try {
      for (let index = 0; index < data.cases.length; index++) {
        caseMenu.value = index;
        await choose(index);
        const name = data.cases[index].name;
        state.image = "low_dose";  // noise: no two slices are alike
        draw();
        changes(`${name}: wheel`, () => canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: 100, cancelable: true })));
        changes(`${name}: slider`, () => set(slider, state.z ? 0 : 1));
        changes(`${name}: arrow up`, () => press("ArrowUp"));
        press("End");
        if (state.z !== data.cases[index].depth - 1) failed.push(`${name}: End`);
        state.z = busiest(data.cases[index]);
        state.image = "normal_dose";
        draw();
        for (const radio of [...radios.querySelectorAll("input")].slice(1)) {
          changes(`${name}: ${radio.value}`, () => click(radio));
          changes(`${name}: ${radio.value}: difference`, () => click(shows.difference));
          click(shows.difference);
        }
        changes(`${name}: arrow left`, () => press("ArrowLeft"));
        const hasOrgan = data.cases[index].images[0].masks.some((bits) => bits & 1);
        if (hasOrgan) changes(`${name}: outline`, () => click(shows.outline));
        if (hasOrgan) changes(`${name}: errors`, () => click(shows.errors));
      }
    } catch (error) {
      failed.push(String(error));
    }
    document.documentElement.dataset.selftest = failed.length ? `failed: ${failed.join("; ")}` : "passed";
    document.documentElement.dataset.problems = problems.join("; ");
  }

  const start = typeof DecompressionStream === "undefined"
    ? Promise.reject(new Error("this browser is too old for the viewer (it needs one of 2023 or later)"))
    : choose(0);
  start.then(() => location.hash === "#selftest" && selftest()).catch((error) => { text.textContent = String(error.message || error); });
})();
