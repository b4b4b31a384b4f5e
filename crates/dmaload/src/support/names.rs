//! Looks up choices by name. The error for an unknown name lists the valid ones.

/// Returns the choice with this name.
///
/// # Errors
/// A message that lists the valid names, if `name` is not one of them.
pub(crate) fn parse<T: Copy>(name: &str, kind: &str, choices: &[T], name_of: impl Fn(T) -> &'static str) -> Result<T, String> {
    choices.iter().copied().find(|&choice| name_of(choice) == name).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|&choice| name_of(choice)).collect();
        format!("no such {kind}: {name:?}; the {kind}s are {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_name_error_lists_the_valid_names() {
        let parse = |name| parse(name, "color", &["red", "green"], |color| color);
        assert_eq!(parse("green"), Ok("green"));
        assert_eq!(parse("gre\u{1b}en").unwrap_err(), "no such color: \"gre\\u{1b}en\"; the colors are red, green");
    }
}
