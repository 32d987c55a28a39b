// What the server does to candidates (handlers/boxes.py) and to pictures (handlers/drawing.py), done again here so
// that a slider acts without another request.

const OKABE_ITO = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]];

/**
 * The candidates that the settings leave over, best score first.
 *
 * candidates: {index, label, score, box: [x1, y1, x2, y2]}, best score first. settings: score and iou thresholds,
 * agnostic (classes suppress each other), limit (most boxes), hidden (a Set of labels not wanted). The server
 * compares boxes before it cuts them at the picture's border, so that there a close call may end otherwise.
 */
export function select(candidates, { score, iou, agnostic, limit, hidden }) {
  const kept = [];
  for (const candidate of candidates) {
    if (kept.length === limit) break;
    if (candidate.score <= score || hidden.has(candidate.label)) continue;
    const rivals = agnostic ? kept : kept.filter(({ index }) => index === candidate.index);
    if (rivals.every(({ box }) => overlap(box, candidate.box) <= iou)) kept.push(candidate);
  }
  return kept;
}

/** Intersection over union of two boxes; 0 where both are empty. */
function overlap(one, other) {
  const width = Math.max(0, Math.min(one[2], other[2]) - Math.max(one[0], other[0]));
  const height = Math.max(0, Math.min(one[3], other[3]) - Math.max(one[1], other[1]));
  const shared = width * height;
  return shared && shared / (area(one) + area(other) - shared);
}

function area([x1, y1, x2, y2]) {
  return (x2 - x1) * (y2 - y1);
}

/** [red, green, blue] in 0..255, the same for a class as in pictures that the server draws. */
export function colour(index) {
  if (index < OKABE_ITO.length) return OKABE_ITO[index];
  const hue = (index * 0.618034) % 1 * 6;
  const saturation = [0.9, 0.45, 0.7][index % 3];
  const value = [0.95, 1, 0.65][index % 3];
  const channel = (shift) => {
    const place = (shift + hue) % 6;
    return Math.round(255 * value * (1 - saturation * Math.max(0, Math.min(place, 4 - place, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

/** Boxes and captions over what is on the canvas, the best on top. scale: canvas pixels a picture pixel. */
export function draw(context, boxes, scale) {
  const unit = window.devicePixelRatio;
  const size = 13 * unit;
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { index, label, score, box } of boxes.toReversed()) {
    const rgb = colour(index);
    const [x1, y1, x2, y2] = box.map((value) => value * scale);
    // A dark rim sets the line off from a picture of its own colour.
    for (const [width, paint] of [[4.5, "rgb(0 0 0 / .45)"], [2.5, `rgb(${rgb})`]]) {
      context.lineWidth = width * unit;
      context.strokeStyle = context.fillStyle = paint;
      context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
    const caption = `${label} ${score.toFixed(2)}`;
    const width = context.measureText(caption).width + 8 * unit;
    // A name that would leave the picture at its upper or right border moves into it.
    const left = Math.max(0, Math.min(x1, context.canvas.width - width));
    const top = Math.max(0, y1 - size - 4 * unit);
    context.fillRect(left, top, width, size + 4 * unit);
    context.fillStyle = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 110 ? "black" : "white";
    context.fillText(caption, left + 4 * unit, top + 2 * unit);
  }
}
