//! What the README shows is what compiles.

use std::path::Path;

#[test]
fn the_readmes_code_stands_in_the_quickstart_example_word_for_word() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(crate_folder.join("../README.md")).unwrap();
    let example = std::fs::read_to_string(crate_folder.join("examples/quickstart.rs")).unwrap();
    let mut snippets = 0;
    for block in readme.split("```rust\n").skip(1) {
        let (code, _) = block.split_once("```").unwrap();
        assert!(
            example.contains(code.trim_end()),
            "the README's code is not in the example:\n{code}"
        );
        snippets += 1;
    }
    assert!(snippets > 0, "the README shows no code");
}
