//! Unpacks what a guest needs from a kernel's packages: the image, the modules and the
//! configuration. The result is kept beside the packages, because unpacking is slow.
//!
//! Debian's packages don't contain an index of the modules' dependencies. To create one, `depmod`
//! would have to decompress the thousands of modules of a full kernel. Instead, `modinfo` reads
//! the dependencies of only those modules that are needed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use dmaload_guest::Line;

use crate::archive;
use crate::debian::{self, Fetched};
use crate::kernels::Kernel;
use crate::run;

/// An unpacked kernel.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The kernel's release line. It is later than the requested line if the archive no longer has
    /// that one.
    pub(crate) line: Line,
    pub(crate) image: PathBuf,
    /// The modules to load, in this order.
    pub(crate) modules: Vec<Module>,
    /// The text of the kernel's `.config`.
    pub(crate) config: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// The path of the decompressed `.ko` file.
    pub(crate) file: PathBuf,
    pub(crate) parameters: String,
}

/// Unpacks what the guest needs from a kernel's packages, unless an earlier run has done so for
/// the same list of modules.
pub(crate) fn unpack(kernel: &Kernel, fetched: &Fetched) -> Result<Unpacked> {
    let ready = fetched.folder.join("unpacked");
    let list = ready.join("modules.list");
    let wanted = format_wanted(kernel);
    let kept = fs::read_to_string(&list).unwrap_or_default();
    if kept.lines().next() != Some(&wanted) {
        let (tree, partial) = (fetched.folder.join("tree"), fetched.folder.join("partial"));
        for folder in [&tree, &partial, &ready] {
            let _ = fs::remove_dir_all(folder);
        }
        for package in debian::list_packages(&fetched.folder)? {
            archive::unpack(&package, &tree)?;
        }
        fs::create_dir_all(&partial)?;
        let unpacked = Tree::open(&tree)?;
        let modules = unpack_modules(kernel, &unpacked, &partial)?;
        for (name, part) in [("vmlinuz", "vmlinuz"), ("config", "config")] {
            fs::rename(unpacked.find_file(part)?, partial.join(name))?;
        }
        fs::write(partial.join("modules.list"), format!("{wanted}\n{modules}"))?;
        fs::rename(&partial, &ready)?;
        fs::remove_dir_all(&tree)?;
    }
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let modules = read(&list)?;
    let modules = modules.lines().skip(1).map(|line| {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        Module { file: ready.join(file), parameters: parameters.to_owned() }
    });
    Ok(Unpacked {
        line: fetched.line,
        image: ready.join("vmlinuz"),
        modules: modules.collect(),
        config: read(&ready.join("config"))?,
    })
}

/// Formats the list of wanted modules as one line. The line is stored with the unpacked files, so
/// that later runs can check whether they want the same modules.
fn format_wanted(kernel: &Kernel) -> String {
    let words = kernel.modules.iter().map(|module| format!("{} {}", module.name, module.parameters));
    words.collect::<Vec<_>>().join(",")
}

/// A kernel's unpacked packages, in either of the layouts that Debian uses.
#[derive(Debug)]
struct Tree {
    /// The path of `/boot`, which newer packages do not have.
    boot: PathBuf,
    /// The path of `/lib/modules/RELEASE` or `/usr/lib/modules/RELEASE`.
    modules: PathBuf,
    /// The path of each module's file, keyed by the module's name.
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
}

impl Tree {
    fn open(root: &Path) -> Result<Self> {
        let folders = ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder));
        let releases = folders.into_iter().find(|folder| folder.is_dir()).context("cannot find modules in the packages")?;
        let modules = fs::read_dir(&releases)?.next().context("cannot find a release in the packages")??.path();
        let mut files = BTreeMap::new();
        list_modules(&modules.join("kernel"), &mut files)?;
        let built_in = fs::read_to_string(modules.join("modules.builtin")).context("cannot read modules.builtin")?;
        let built_in = built_in.lines().map(|line| module_name(Path::new(line))).collect();
        Ok(Tree { boot: root.join("boot"), modules, files, built_in })
    }

    /// Finds a file such as `vmlinuz`. It is either in the modules' folder, or in `/boot`, where
    /// its name ends with the kernel's release.
    fn find_file(&self, part: &str) -> Result<PathBuf> {
        let beside = self.modules.join(part);
        if beside.exists() {
            return Ok(beside);
        }
        let release = self.modules.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let path = self.boot.join(format!("{part}-{release}"));
        if path.exists() { Ok(path) } else { bail!("cannot find {part} in the packages") }
    }
}

fn list_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            list_modules(&path, files)?;
        } else {
            files.insert(module_name(&path), path);
        }
    }
    Ok(())
}

/// Returns the name of the module in this file: `dm_mod` for `dm-mod.ko.xz`.
fn module_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

/// Decompresses the modules into `folder`, and returns a line `NAME.ko PARAMETERS` for each.
fn unpack_modules(kernel: &Kernel, tree: &Tree, folder: &Path) -> Result<String> {
    let mut order = Order::default();
    let known = Known { built_in: &tree.built_in, needs: &|name| tree.files.get(name).map(|file| read_needs(file)).transpose() };
    for module in kernel.modules {
        order
            .add(module.name, module.parameters, module.optional, &known)
            .with_context(|| format!("cannot resolve the module dependencies of {}", kernel.id))?;
    }
    let mut list = String::new();
    for (name, parameters) in order.modules {
        let file = &tree.files[&name];
        let plain = folder.join(format!("{name}.ko"));
        if file.extension().is_some_and(|extension| extension == "xz") {
            let status =
                Command::new("xz").arg("-dc").arg(file).stdin(Stdio::null()).stdout(fs::File::create(&plain)?).status()?;
            if !status.success() {
                bail!("cannot decompress {}", file.display());
            }
        } else {
            fs::copy(file, &plain)?;
        }
        list.push_str(&format!("{name}.ko {parameters}\n"));
    }
    Ok(list)
}

/// A module's dependencies.
#[derive(Debug, Default, Clone)]
struct Needs {
    hard: Vec<String>,
    /// Modules that must be loaded before this one if they exist.
    soft: Vec<String>,
}

fn read_needs(module: &Path) -> Result<Needs> {
    let field = |name: &str| run::output(run::tool("modinfo").args(["-F", name]).arg(module));
    Ok(Needs { hard: parse_depends(&field("depends")?), soft: parse_softdep(&field("softdep")?) })
}

fn parse_depends(field: &str) -> Vec<String> {
    field.split([',', '\n']).map(|name| name.trim().replace('-', "_")).filter(|name| !name.is_empty()).collect()
}

/// Parses the modules that must be loaded before this one. In `pre: one two post: three`, these
/// are `one` and `two`.
fn parse_softdep(field: &str) -> Vec<String> {
    let mut is_pre = false;
    let mut names = Vec::new();
    for word in field.split_whitespace() {
        match word.strip_suffix(':') {
            Some(kind) => is_pre = kind == "pre",
            None if is_pre => names.push(word.replace('-', "_")),
            None => {}
        }
    }
    names
}

/// A kernel's built-in modules, and the dependencies of its other modules.
struct Known<'a> {
    built_in: &'a [String],
    /// Returns a module's dependencies, or `None` if the module does not exist.
    needs: &'a dyn Fn(&str) -> Result<Option<Needs>>,
}

/// Modules in load order: each one comes after its dependencies.
#[derive(Debug, Default)]
struct Order {
    modules: Vec<(String, String)>,
}

impl Order {
    fn add(&mut self, name: &str, parameters: &str, optional: bool, kernel: &Known<'_>) -> Result<()> {
        if kernel.built_in.iter().any(|known| known == name) {
            return Ok(());
        }
        if let Some((_, known)) = self.modules.iter_mut().find(|(known, _)| known == name) {
            // The module may already have been added as a dependency, without parameters.
            if !parameters.is_empty() {
                *known = parameters.to_owned();
            }
            return Ok(());
        }
        let Some(needs) = (kernel.needs)(name)? else {
            if optional {
                return Ok(());
            }
            bail!("cannot find the module {name} in the packages");
        };
        let hard = needs.hard.iter().map(|name| (name, false));
        for (name, optional) in needs.soft.iter().map(|name| (name, true)).chain(hard) {
            self.add(name, "", optional, kernel)?;
        }
        self.modules.push((name.to_owned(), parameters.to_owned()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(name: &str) -> Result<Option<Needs>> {
        let some = |hard: &str, soft: &str| Some(Needs { hard: parse_depends(hard), soft: parse_softdep(soft) });
        Ok(match name {
            "vivid" => some("core,v4l2-tpg\n", ""),
            "v4l2_tpg" => some("core\n", "pre: crc32c nothing post: later\n"),
            "crc32c" | "core" => some("\n", ""),
            _ => None,
        })
    }

    fn order(wanted: &[(&str, bool)]) -> Result<Vec<(String, String)>> {
        let mut order = Order::default();
        let kernel = Known { built_in: &["virtio_pci".to_owned()], needs: &needs };
        for (name, optional) in wanted {
            order.add(name, if *name == "vivid" { "n_devs=1 a=2" } else { "" }, *optional, &kernel)?;
        }
        Ok(order.modules)
    }

    #[test]
    fn modules_come_once_and_after_their_dependencies() {
        let expected = [("core", ""), ("crc32c", ""), ("v4l2_tpg", ""), ("vivid", "n_devs=1 a=2")];
        let expected = expected.map(|(name, parameters)| (name.to_owned(), parameters.to_owned()));
        assert_eq!(order(&[("virtio_pci", false), ("vivid", false), ("vivid", false)]).unwrap(), expected);
    }

    #[test]
    fn module_added_as_a_dependency_gets_its_own_parameters() {
        let mut order = Order::default();
        let kernel = Known { built_in: &[], needs: &needs };
        for (name, parameters) in [("v4l2_tpg", ""), ("core", "debug=1"), ("v4l2_tpg", "")] {
            order.add(name, parameters, false, &kernel).unwrap();
        }
        let expected = [("crc32c", ""), ("core", "debug=1"), ("v4l2_tpg", "")];
        assert_eq!(order.modules, expected.map(|(name, parameters)| (name.to_owned(), parameters.to_owned())));
    }

    #[test]
    fn only_an_optional_module_may_be_missing() {
        assert_eq!(order(&[("system_heap", true)]).unwrap(), []);
        assert!(order(&[("system_heap", false)]).unwrap_err().to_string().contains("system_heap"));
    }

    #[test]
    fn module_is_named_after_its_file() {
        assert_eq!(module_name(Path::new("kernel/drivers/md/dm-mod.ko.xz")), "dm_mod");
    }
}
