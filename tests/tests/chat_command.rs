//! `flashlm run` with chat templates and the publisher's sampling, without a terminal.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use flashlm::{Conversation, Model};
use flashlm_formats::bundle::Bundle;
use flashlm_formats::sessions::SessionReader;
use flashlm_tests::{CHAT_TEMPLATE, Said, copied, pack_checkpoint, run, scratch, tiny_opt};
use tempfile::TempDir;

const SAMPLES: &str = r#"{"do_sample": true, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [2, 5]}"#;

/// A bundle made by the command, with a template and sampling defaults.
fn bundle() -> (TempDir, String) {
    let checkpoint = copied(&tiny_opt());
    fs::write(checkpoint.path().join("chat_template.jinja"), CHAT_TEMPLATE).unwrap();
    fs::write(checkpoint.path().join("generation_config.json"), SAMPLES).unwrap();
    let dir = scratch();
    let path = dir.path().join("m.flashlm").to_str().unwrap().to_owned();
    run("flashlm-prep", &["convert", checkpoint.path().to_str().unwrap(), "-o", &path], "").succeeded();
    (dir, path)
}

fn flashlm(bundle: &str, args: &[&str]) -> Said {
    run("flashlm", &[&["run", bundle, "-n", "12"], args].concat(), "")
}

#[test]
fn a_prompt_is_a_turn_and_the_library_says_the_same() {
    let (dir, path) = bundle();
    let greedy = ["--temperature", "0", "--system", "Tell stories.", "--prompt", "Once upon a time"];
    let said = flashlm(&path, &greedy).succeeded();
    assert_eq!(flashlm(&path, &[&greedy[..], &["--chat"]].concat()).succeeded(), said);
    let model = Model::open(&path).unwrap().load().unwrap();
    let template = model.chat_template(false).unwrap();
    let mut conversation = Conversation::new(model.session().unwrap().max_tokens(12), template);
    conversation.set_system(Some("Tell stories.".into())).unwrap();
    let mut answer = String::new();
    let mut add = |progress: flashlm::Progress<'_>| {
        if let flashlm::Progress::Token(token) = progress {
            answer += &token.text;
        }
        ControlFlow::Continue(())
    };
    conversation.ask("Once upon a time", &mut add).unwrap();
    assert_eq!(answer + "\n", said);
    let plain = flashlm(&path, &["--temperature", "0", "--prompt", "Once upon a time"]).succeeded();
    assert_ne!(plain, said, "without --chat a prompt is continued");

    // Saved, it is a conversation to go on with.
    let file = dir.path().join("chat.kv");
    let kept = [&greedy[..], &["--session", file.to_str().unwrap()]].concat();
    assert_eq!(flashlm(&path, &kept).succeeded(), said);
    let saved = SessionReader::open(&file).unwrap().session().conversation.clone().unwrap();
    assert!(
        saved.contains("\"system\":\"Tell stories.\"") && saved.contains("\"user\":\"Once upon a time\""),
        "{saved}"
    );
    let again = flashlm(&path, &kept);
    assert!(again.stderr.contains("of the prompt are in"), "{again:?}");
    assert_eq!(again.succeeded(), said);
}

#[test]
fn the_publisher_is_followed_unless_asked_otherwise() {
    let (_dir, path) = bundle();
    assert_eq!(Bundle::open(&path).unwrap().spec().eos, [2, 5]);
    let prompt = ["--prompt", "Once upon a time"];
    let with = |more: &[&str]| flashlm(&path, &[&prompt[..], more].concat());
    let said = with(&[]);
    assert!(said.stderr.contains("publisher recommends: temperature 0.7, top-k 50, top-p 0.9;"), "{said:?}");
    let seed = said.stderr.split_once("--seed ").unwrap().1.split(' ').next().unwrap().to_owned();
    let text = said.succeeded();
    let asked = with(&["--seed", &seed, "--temperature", "0.7", "--top-k", "50", "--top-p", "0.9"]);
    assert!(!asked.stderr.contains("recommends"), "{asked:?}");
    assert_eq!(asked.succeeded(), text, "it is what was said");
    let partly = with(&["--seed", "1", "--top-k", "3"]);
    assert!(partly.stderr.contains("recommends: temperature 0.7, top-p 0.9;"), "{partly:?}");
    let greedy = with(&["--temperature", "0"]);
    assert!(!greedy.stderr.contains("seed") && !greedy.stderr.contains("top-p"), "{greedy:?}");
    let json = with(&["--json"]);
    assert!(!json.stderr.contains("recommends"), "{json:?}");
    let last: serde_json::Value = serde_json::from_str(json.succeeded().lines().last().unwrap()).unwrap();
    assert!(last["seed"].is_u64(), "{last}");
    // A bundle that recommends nothing is greedy, and has no template.
    let plain = scratch();
    let bare = plain.path().join("bare.flashlm");
    pack_checkpoint(&tiny_opt(), &bare);
    let said = flashlm(bare.to_str().unwrap(), &prompt);
    assert!(!said.stderr.contains("recommends") && !said.stderr.contains("seed"), "{said:?}");
    said.succeeded();
}

#[test]
fn what_cannot_be_a_conversation_is_said_before_anything_is_loaded() {
    let dir = scratch();
    let bare = dir.path().join("bare.flashlm");
    pack_checkpoint(&tiny_opt(), &bare);
    let bare = bare.to_str().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let prompt = ["--prompt", "Once"];
    let with = |more: &[&str]| flashlm(bare, &[&prompt[..], more].concat());
    for asks in [&["--chat"][..], &["--system", "a"]] {
        with(asks).failed(1, &["no chat template", "--chat-template FILE", "--no-chat"]);
    }
    flashlm(bare, &["--ids", "5,6", "--chat"]).failed(2, &["--chat"]);
    with(&["--no-chat", "--system", "a"]).failed(2, &["--system"]);
    with(&["--when-full", "never"]).failed(2, &["shift", "summarise", "stop"]);
    let template = |text: &str| write("t.jinja", text);
    with(&["--chat-template", &template(CHAT_TEMPLATE)]).succeeded();
    with(&["--chat-template", &template("{% for %}")]).failed(1, &["chat template cannot be used", "line 1"]);
    with(&["--chat-template", &template("{{ raise_exception('not today') }}")])
        .failed(1, &["of this conversation: not today"]);
    with(&["--chat-template", dir.path().join("none").to_str().unwrap()]).failed(1, &["cannot read the chat template"]);
    // One that knows no system messages.
    let user = template("{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}");
    let said = with(&["--system", "Be terse.", "--chat-template", &user, "--json"]);
    assert!(said.stderr.contains("goes in front of what the user says first"), "{said:?}");
    let last: serde_json::Value = serde_json::from_str(said.succeeded().lines().last().unwrap()).unwrap();
    let model = Model::open(Path::new(bare)).unwrap();
    let expected = model.tokenizer().encode_bare("Be terse.\n\nOnce").unwrap();
    assert_eq!(last["prompt_tokens"], expected.len());
}
