import { colour, draw, select } from "./boxes.js";

// All candidates are asked for once: suppression that suppresses nothing, and as many as the server gives.
const FLOOR = { score_threshold: 0.01, iou_threshold: 1, max_detections: 1000, class_agnostic: false };
const KEY = "marina-key";
const STAGES = ["decode", "preprocess", "inference", "postprocess"];

const at = (id) => document.getElementById(id);
const state = {
  models: [],
  suggested: false, // the sliders stood at the model's own thresholds once
  turn: 0, // counts pictures, so that the last one chosen wins
  picture: null,
  answers: [],
  hidden: new Set(), // classes not wanted
  request: new AbortController(),
  retry: start,
  waiting: 0, // for the moment that the server named
};

class Refused extends Error {
  constructor(status, message, wait) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { Accept: "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  const text = await response.text();
  let content = {};
  try {
    content = JSON.parse(text);
  } catch {
    if (response.ok) throw new Refused(response.status, "its answer is no JSON");
  }
  // A date, which proxies may send, is no number.
  const wait = Number(response.headers.get("Retry-After")) || 0;
  if (!response.ok) throw new Refused(response.status, content.message ?? text.slice(0, 200), wait);
  return content;
}

function explain(error) {
  if (!(error instanceof Refused)) {
    return "The gateway does not answer. Check that it runs and that you are connected, then try again.";
  }
  const later = error.wait ? ` This page tries again in ${error.wait} s.` : "";
  if (error.status === 401 || error.status === 403) {
    return sessionStorage.getItem(KEY)
      ? `The gateway refused this API key: ${error.message}`
      : "This gateway wants an API key: enter yours at the top of the page.";
  }
  if (error.status === 429) return `Too many requests.${later}`;
  if (error.status === 503) return `The model server does not answer now: ${error.message}.${later}`;
  if (error.status < 500) return `The gateway refused this: ${error.message}`;
  return `The gateway failed (${error.status}): ${error.message}`;
}

function tell(text) {
  at("status").textContent = text;
}

function settle() {
  clearTimeout(state.waiting);
  at("problem").hidden = true;
}

function complain(text, retry) {
  settle();
  state.retry = retry;
  at("problem-text").textContent = text;
  at("again").hidden = !retry;
  at("problem").hidden = false;
  tell("");
}

function fail(error, retry) {
  if (error.name === "AbortError") return;
  const final = error instanceof Refused && error.status < 500 && error.status !== 429;
  complain(explain(error), final ? null : retry);
  if (error.wait && !final) state.waiting = setTimeout(retry, 1000 * error.wait);
  if (error.status === 401 || error.status === 403) at("key").focus();
}

async function loadModels() {
  settle();
  try {
    state.models = (await call("../models")).models;
  } catch (error) {
    fail(error, start);
    return false;
  }
  fillModels(at("model"), []);
  fillModels(at("other"), [new Option("no other model", "")]);
  if (!state.suggested) suggestThresholds();
  return true;
}

function fillModels(menu, before) {
  const chosen = menu.value;
  const options = state.models.map((model, index) => new Option(title(model), index));
  menu.replaceChildren(...before, ...options);
  if ([...menu.options].some(({ value }) => value === chosen)) menu.value = chosen;
}

function suggestThresholds() {
  const model = state.models[at("model").value];
  state.suggested = Boolean(model?.healthy);
  if (!state.suggested) return;
  at("score").value = model.postprocess.score_threshold;
  at("iou").value = model.postprocess.iou_threshold;
  show();
}

async function start() {
  if ((await loadModels()) && state.picture) await ask();
}

async function choose(blob, name) {
  clear();
  state.picture = null;
  const turn = ++state.turn;
  if (blob.type && !blob.type.startsWith("image/")) {
    complain(`${name} is no picture (${blob.type}). Choose a JPEG, PNG, WebP, BMP, GIF or TIFF file.`, null);
    return;
  }
  // Of what the browser cannot show, such as TIFF, the server may still answer the boxes.
  const bitmap = await createImageBitmap(blob).catch(() => null);
  if (turn !== state.turn) return;
  state.picture = { blob, name, bitmap };
  if (bitmap) showChosen();
  await ask();
}

function clear() {
  state.request.abort();
  state.answers = [];
  state.hidden.clear();
  settle();
  at("views").replaceChildren();
  at("copies").hidden = at("classes").hidden = true;
}

async function ask() {
  state.request.abort();
  settle();
  // A model that was down has told nothing of itself.
  if (!(state.models.length && state.models.every(({ healthy }) => healthy)) && !(await loadModels())) return;
  if (!state.picture) return; // another one is just being chosen
  const request = (state.request = new AbortController());
  const wanted = [at("model").value, at("other").value].filter((value) => value !== "").map((value) => state.models[value]);
  tell("Asking …");
  try {
    state.answers = await Promise.all(wanted.map((model) => detect(model, request.signal)));
  } catch (error) {
    request.abort();
    if (request === state.request) fail(error, ask);
    return;
  }
  makeViews();
  show();
}

async function detect(model, signal) {
  const body = new FormData();
  body.append("file", state.picture.blob, state.picture.name);
  for (const [name, value] of Object.entries({ model: model.name, ...FLOOR })) body.append(name, value);
  if (model.version) body.append("version", model.version);
  const begin = performance.now();
  const answer = await call("../detect", { method: "POST", body, signal });
  return { model, answer, elapsed: performance.now() - begin };
}

// Until there is an answer.
function showChosen() {
  const { name, bitmap } = state.picture;
  const view = newView(name);
  at("views").replaceChildren(view);
  paint(view.querySelector("canvas"), "Picture, not answered yet", bitmap.width, bitmap.height);
}

function newView(caption) {
  const view = at("view").content.cloneNode(true).firstElementChild;
  view.querySelector("figcaption").textContent = caption;
  return view;
}

function makeViews() {
  const views = state.answers.map((each) => {
    const view = newView(title(each.model));
    each.canvas = view.querySelector("canvas");
    fillTiming(view, each);
    return view;
  });
  at("views").replaceChildren(...views);
  at("copies").hidden = at("classes").hidden = false;
}

function fillTiming(view, { answer, elapsed }) {
  const stages = STAGES.filter((stage) => stage in answer.timing_ms).map((stage) => [stage, answer.timing_ms[stage]]);
  const inside = stages.reduce((sum, [, ms]) => sum + ms, 0);
  const rows = [...stages, ["queues and network", Math.max(0, elapsed - inside)], ["all", elapsed]];
  const pairs = rows.map(([stage, ms]) => {
    const pair = document.createElement("div");
    pair.append(element("dt", stage), element("dd", `${ms.toFixed(1)} ms`));
    return pair;
  });
  view.querySelector("dl").append(...pairs);
}

function element(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

function settings(model, hidden) {
  const { class_agnostic: agnostic, max_detections: limit } = model.postprocess;
  return { score: Number(at("score").value), iou: Number(at("iou").value), agnostic, limit, hidden };
}

function show() {
  at("score-shown").textContent = Number(at("score").value).toFixed(2);
  at("iou-shown").textContent = Number(at("iou").value).toFixed(2);
  if (!state.answers.length) return;
  const counts = new Map();
  for (const each of state.answers) {
    const { model, answer } = each;
    each.boxes = select(answer.detections, settings(model, state.hidden));
    for (const { label, index } of select(answer.detections, settings(model, new Set()))) {
      counts.set(label, { index, count: (counts.get(label)?.count ?? 0) + 1 });
    }
    showPicture(each);
  }
  showClasses(counts);
  showCopies();
  tell(state.answers.map(summary).join(" "));
}

function summary({ model, answer, boxes }) {
  const all = answer.detections;
  const most = all.length === FLOOR.max_detections && all.at(-1).score > Number(at("score").value);
  const cut = most ? ` Only the best ${all.length} candidates are known, down to a score of ${all.at(-1).score.toFixed(2)}.` : "";
  return `${title(model)}: ${boxes.length === 1 ? "1 box" : `${boxes.length} boxes`}.${cut}`;
}

function title({ name, version }) {
  return `${name} ${version}`.trimEnd();
}

function showPicture({ answer, boxes, canvas }) {
  const label = `Picture with ${boxes.map(({ label }) => label).join(", ") || "no boxes"}`;
  draw(paint(canvas, label, answer.width, answer.height), boxes, canvas.width / answer.width);
}

function paint(canvas, label, pictureWidth, pictureHeight) {
  canvas.setAttribute("aria-label", label);
  const ratio = pictureWidth / pictureHeight;
  const width = Math.min(canvas.parentElement.clientWidth, 0.85 * window.innerHeight * ratio);
  canvas.style.width = `${width}px`;
  canvas.width = Math.max(1, Math.round(width * window.devicePixelRatio));
  canvas.height = Math.max(1, Math.round(canvas.width / ratio));
  const context = canvas.getContext("2d");
  if (state.picture.bitmap) context.drawImage(state.picture.bitmap, 0, 0, canvas.width, canvas.height);
  return context;
}

function showClasses(counts) {
  const list = at("class-list");
  const lines = new Map([...list.children].map((line) => [line.dataset.label, line]));
  for (const [label, line] of lines) if (!counts.has(label) && !state.hidden.has(label)) line.remove();
  for (const [label, { index }] of counts) if (!lines.has(label)) list.append(classLine(label, index));
  for (const line of list.children) {
    line.querySelector("input").checked = !state.hidden.has(line.dataset.label);
    line.querySelector(".count").textContent = counts.get(line.dataset.label)?.count ?? 0;
  }
}

function classLine(label, index) {
  const box = Object.assign(document.createElement("input"), { type: "checkbox" });
  box.addEventListener("change", () => {
    state.hidden[box.checked ? "delete" : "add"](label);
    show();
  });
  const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
  swatch.style.background = `rgb(${colour(index)})`;
  const frame = document.createElement("label");
  const count = Object.assign(document.createElement("span"), { className: "count" });
  frame.append(box, swatch, label, count);
  const line = document.createElement("li");
  line.dataset.label = label;
  line.append(frame);
  return line;
}

function showCopies() {
  at("json").textContent = state.answers.map(asJson).join("\n");
  at("curl").textContent = state.answers.map(asCurl).join("\n");
}

function asJson({ answer, boxes }) {
  const { detections, ...rest } = answer;
  const rows = boxes.map((box) => `  ${JSON.stringify(box)}`).join(",\n");
  return `${JSON.stringify(rest).slice(0, -1)},"detections":[\n${rows}\n]}`;
}

function asCurl({ model }) {
  const { score, iou } = settings(model, state.hidden);
  const fields = { model: model.name, version: model.version, score_threshold: score, iou_threshold: iou };
  if (state.hidden.size) fields.classes = wantedClasses(model);
  const file = `file=@"${state.picture.name.replaceAll(/["\\]/g, "\\$&")}"`;
  const form = [file, ...Object.entries(fields).map(([name, value]) => `${name}=${value}`)];
  const key = sessionStorage.getItem(KEY) ? ` -H "Authorization: Bearer $MARINA_KEY"` : "";
  return `curl${key} ${form.map((part) => `-F ${quoted(part)}`).join(" ")} ${new URL("../detect", location)}`;
}

function wantedClasses({ labels }) {
  return labels.filter((label) => label !== "__background__" && !state.hidden.has(label)).join(",");
}

function quoted(text) {
  return /^[\w.,=/-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

async function copy(button) {
  const source = at(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(source.textContent);
    tell("Copied.");
  } catch {
    // Browsers give pages without HTTPS no clipboard.
    getSelection().selectAllChildren(source);
    tell("Selected: copy it with your keyboard.");
  }
}

async function openCamera() {
  if (!navigator.mediaDevices) {
    complain("Browsers give the camera only to pages by HTTPS, or from this machine.", null);
    return;
  }
  try {
    at("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    complain(`The camera cannot be used: ${error.message}`, null);
    return;
  }
  at("shoot").disabled = true;
  at("camera-view").showModal();
}

function closeCamera() {
  for (const track of at("video").srcObject?.getTracks() ?? []) track.stop();
  at("video").srcObject = null;
}

async function shoot() {
  const video = at("video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  at("camera-view").close();
  await choose(blob, "camera.jpg");
}

async function chooseSample(name) {
  try {
    await choose(await (await fetch(name)).blob(), name);
  } catch (error) {
    fail(error, () => chooseSample(name));
  }
}

function chooseFirst(files) {
  if (files.length) choose(files[0], files[0].name);
}

function listen() {
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (at("key").value) sessionStorage.setItem(KEY, at("key").value);
    else sessionStorage.removeItem(KEY);
    start();
  });
  at("file").addEventListener("change", () => {
    chooseFirst([...at("file").files]);
    at("file").value = ""; // the same file can be chosen again
  });
  document.addEventListener("paste", (event) => chooseFirst(event.clipboardData.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    chooseFirst(event.dataTransfer.files);
  });
  for (const button of at("samples").children) button.addEventListener("click", () => chooseSample(button.dataset.sample));
  at("camera").addEventListener("click", openCamera);
  at("camera-view").addEventListener("close", closeCamera);
  at("camera-close").addEventListener("click", () => at("camera-view").close());
  at("shoot").addEventListener("click", shoot);
  at("video").addEventListener("loadeddata", () => (at("shoot").disabled = false));
  at("model").addEventListener("change", () => {
    suggestThresholds();
    if (state.picture) ask();
  });
  at("other").addEventListener("change", () => state.picture && ask());
  for (const id of ["score", "iou"]) at(id).addEventListener("input", show);
  at("all").addEventListener("click", () => setAllClasses(true));
  at("none").addEventListener("click", () => setAllClasses(false));
  for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
  at("again").addEventListener("click", () => state.retry());
  window.addEventListener("resize", show);
}

function setAllClasses(shown) {
  state.hidden = new Set(shown ? [] : [...at("class-list").children].map((line) => line.dataset.label));
  show();
}

at("key").value = sessionStorage.getItem(KEY) ?? "";
listen();
show();
start();
