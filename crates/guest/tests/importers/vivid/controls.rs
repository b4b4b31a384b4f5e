//! vivid's controls, set so that a frame passes the loopback byte for byte.

use std::{
    fs::File,
    io::{self, ErrorKind},
};

use super::v4l2::{
    CONTROL_BOOLEAN, CONTROL_FIXED, CONTROL_INTEGER, CONTROL_MENU, CONTROL_NEXT, Control, QUERYCTRL, QUERYMENU, QueryControl,
    QueryMenu, S_CTRL, during, failed, ioctl, text,
};

/// The value that lets a frame pass unchanged.
enum Setting {
    Value(i32),
    Item(&'static str),
    /// The menu item of an HDMI output of the same instance.
    Link,
}

/// Decides by name, because numbers and kinds of vivid's controls differ between kernels. Leaves
/// names with "Inject" alone: those buttons break the device on purpose.
fn setting(name: &str, instance: &str) -> Option<Setting> {
    Some(match name {
        // The loopback: a switch on older kernels, a choice of partner on newer ones.
        "Loop Video" => Setting::Value(1),
        _ if name.starts_with("HDMI") && name.ends_with("Connected To") && name.contains(instance) => Setting::Link,
        // Overlays on the picture.
        "OSD Text Mode" => Setting::Item("None"),
        "Show Border" | "Show Square" => Setting::Value(0),
        _ if name.starts_with("Insert ") => Setting::Value(0),
        "Fill Percentage of Frame" => Setting::Value(100),
        // Moves and scales.
        "Horizontal Flip" | "Vertical Flip" => Setting::Value(0),
        _ if name.starts_with("Sensor Flipped") => Setting::Value(0),
        _ if name.starts_with("Enable Capture ") || name.starts_with("Enable Output ") => Setting::Value(0),
        // Dropped frames and signals.
        "Percentage of Dropped Buffers" => Setting::Value(0),
        "DV Timings Signal Mode" => Setting::Item("Current DV Timings"),
        // Without a looped picture, no two frames may be alike.
        "Test Pattern" => Setting::Item("Noise"),
        _ => return None,
    })
}

/// Sets the controls of a node. Returns whether one of them turned the loopback on.
pub(super) fn set_controls(node: &File, instance: &str) -> io::Result<bool> {
    let mut linked = false;
    let mut query = QueryControl { id: CONTROL_NEXT, ..QueryControl::default() };
    // The list ends with EINVAL.
    while ioctl(node, &QUERYCTRL, &mut query).is_ok() {
        let here = query;
        query = QueryControl { id: here.id | CONTROL_NEXT, ..QueryControl::default() };
        let name = text(&here.name);
        let settable = here.flags & CONTROL_FIXED == 0;
        if !settable || ![CONTROL_INTEGER, CONTROL_BOOLEAN, CONTROL_MENU].contains(&here.kind) {
            continue;
        }
        let Some(setting) = setting(name, instance) else {
            continue;
        };
        let is_link = matches!(setting, Setting::Link) || name == "Loop Video";
        if is_link && linked {
            // An output has a single partner.
            continue;
        }
        let value = match setting {
            Setting::Value(value) => Some(value),
            Setting::Item(item) => menu_index(node, &here, |entry| entry == item),
            Setting::Link => {
                let partner = format!("HDMI {instance}-");
                menu_index(node, &here, |entry| entry.contains(&partner))
            }
        };
        let value = value.ok_or_else(|| failed(ErrorKind::Unsupported, &format!("\"{name}\" lacks the item")))?;
        let mut control = Control { id: here.id, value };
        during(name, ioctl(node, &S_CTRL, &mut control))?;
        if control.value != value {
            return Err(failed(ErrorKind::Unsupported, &format!("\"{name}\" took {} for {value}", control.value)));
        }
        linked |= is_link;
    }
    Ok(linked)
}

fn menu_index(node: &File, control: &QueryControl, is_it: impl Fn(&str) -> bool) -> Option<i32> {
    (control.minimum..=control.maximum).find(|&index| {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let mut entry = QueryMenu { id: control.id, index, ..QueryMenu::default() };
        // A menu answers EINVAL for an entry that it leaves out.
        ioctl(node, &QUERYMENU, &mut entry).is_ok() && is_it(text(&entry.name))
    })
}
