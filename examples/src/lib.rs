//! The examples are in `examples/`: `cargo run -p dmaload-examples --example hello -- MODEL`.

#[cfg(test)]
mod tests {
    #[test]
    fn the_readme_shows_the_hello_example_as_it_is() {
        let readme = include_str!("../../README.md");
        let (_, hello) = include_str!("../examples/hello.rs").split_once("use ").expect("code after the comment");
        let (_, block) = readme.split_once("```rust\nuse ").expect("a Rust block");
        let (block, _) = block.split_once("```").expect("the block's end");
        assert_eq!(block, hello);
    }
}
