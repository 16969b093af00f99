// This pack's templates: in the order of their names, where the start comes first, and opened at the size they were
// laid out for, with the notes of the first ones in the language of the page. The host lists files in the order of the disk, and shrinks a template until all of it is in the window.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const MARK = "turbowan_template"; // in the extra of a template; gone from what becomes of it

const listed = api.getWorkflowTemplates;
api.getWorkflowTemplates = async function (...given) {
  const templates = await listed.apply(this, given);
  templates?.[FOLDER]?.sort();
  return templates;
};

// notes.json: {language: {English note: translation}}. A note that was changed is found no more and stays as it is.
async function translateNotes() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  const notes = app.graph.nodes.filter((node) => node.type === "MarkdownNote");
  const answer = await fetch(new URL("./notes.json", import.meta.url));
  const known = answer.ok ? (await answer.json())[language] : undefined;
  for (const note of known ? notes : []) {
    const text = note.widgets?.[0];
    if (text && known[text.value]) text.value = known[text.value];
  }
}

app.registerExtension({
  name: "TurboWan.Templates",
  afterConfigureGraph() {
    const extra = app.graph.extra;
    if (!extra?.[MARK]) return;
    delete extra[MARK];
    translateNotes();
    const { scale, offset } = extra.ds;
    const show = () => {
      app.canvas.ds.scale = scale;
      app.canvas.ds.offset[0] = offset[0];
      app.canvas.ds.offset[1] = offset[1];
      app.canvas.setDirty(true, true);
    };
    show();
    requestAnimationFrame(() => requestAnimationFrame(show)); // the host fits it in the next frame, if not before
  },
});
