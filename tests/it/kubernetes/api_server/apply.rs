//! The three kinds of patch: JSON Patch, merge patch, and server-side apply with managed fields.
//!
//! Owns how an object changes. Does not know where it is stored.

use serde_json::{Map, Value, json};

use super::rights::Named;

/// RFC 6902 with add, remove, replace and test. `None` if the patch does not fit the object.
pub fn json_patch(mut object: Value, patch: &Value) -> Option<Value> {
    for step in patch.as_array()? {
        let path = step["path"].as_str()?;
        let (parent, last) = path.rsplit_once('/')?;
        let last = last.replace("~1", "/").replace("~0", "~");
        let fields = object.pointer_mut(parent)?.as_object_mut()?;
        match step["op"].as_str()? {
            "add" => {
                fields.insert(last, step["value"].clone());
            }
            "replace" => *fields.get_mut(&last)? = step["value"].clone(),
            "remove" => {
                fields.remove(&last)?;
            }
            "test" if fields.get(&last) == step.get("value") => {}
            _ => return None,
        }
    }
    Some(object)
}

/// RFC 7386.
pub fn merge_patch(object: Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else { return patch.clone() };
    let mut fields = match object {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    for (name, change) in patch {
        if change.is_null() {
            fields.remove(name);
        } else {
            let old = fields.remove(name).unwrap_or_default();
            fields.insert(name.clone(), merge_patch(old, change));
        }
    }
    fields.into()
}

/// Server-side apply: removes the fields that the manager applied before and does not apply now, and merges the others.
pub fn apply(
    old: Option<&Value>,
    applied: &Value,
    manager: &str,
    schema: Option<&Value>,
    named: &Named,
) -> Result<Value, String> {
    if let Some(schema) = schema
        && let Err(wrong) = check(schema, applied)
    {
        let namespace =
            named.namespace.as_deref().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        let (name, version) = (named.name.as_deref().unwrap_or_default(), &applied["apiVersion"]);
        let (version, kind) =
            (version.as_str().unwrap_or_default(), applied["kind"].as_str().unwrap_or_default());
        return Err(format!(
            "failed to create typed patch object ({namespace}{name}; {version}, Kind={kind}): {wrong}"
        ));
    }
    let mut mine = applied.clone();
    for field in ["apiVersion", "kind", "metadata"] {
        mine.as_object_mut().map(|fields| fields.remove(field));
    }
    let fields = field_set(&mine, schema);
    let mut object = old.cloned().unwrap_or_else(|| json!({ "metadata": {} }));
    let mut managers: Vec<Value> =
        object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let is_mine = |entry: &Value| entry["manager"] == manager && entry["operation"] == "Apply";
    if let Some(before) = managers.iter().find(|entry| is_mine(entry)) {
        remove_left(&mut object, &before["fieldsV1"], &fields);
    }
    merge(&mut object, applied);
    let entry = json!({
        "manager": manager, "operation": "Apply", "apiVersion": applied["apiVersion"],
        "time": "2026-11-23T20:57:19Z", "fieldsType": "FieldsV1", "fieldsV1": fields,
    });
    managers.retain(|entry| !is_mine(entry));
    managers.insert(0, entry);
    object["metadata"]["managedFields"] = managers.into();
    Ok(object)
}

fn merge(object: &mut Value, applied: &Value) {
    match (object, applied) {
        (Value::Object(object), Value::Object(applied)) => {
            for (name, value) in applied {
                merge(object.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (object, applied) => *object = applied.clone(),
    }
}

/// Returns a set of fields as in `fieldsV1`. Each entry of a map (`additionalProperties`) has its own manager.
fn field_set(value: &Value, schema: Option<&Value>) -> Value {
    let Value::Object(fields) = value else { return json!({}) };
    let mut set = Map::new();
    for (name, value) in fields {
        let property = schema.and_then(|schema| schema["properties"].get(name));
        let entry = schema.and_then(|schema| schema.get("additionalProperties"));
        let mut inner = field_set(value, property.or(entry));
        if property.is_none() && entry.is_some() && value.as_object().is_some_and(|fields| !fields.is_empty())
        {
            inner["."] = json!({});
        }
        set.insert(format!("f:{name}"), inner);
    }
    set.into()
}

fn remove_left(object: &mut Value, before: &Value, now: &Value) {
    let (Value::Object(object), Some(before)) = (object, before.as_object()) else { return };
    for (name, inner) in before {
        let Some(field) = name.strip_prefix("f:") else { continue };
        match now.get(name) {
            None => {
                object.remove(field);
            }
            Some(now) => {
                if let Some(value) = object.get_mut(field) {
                    remove_left(value, inner, now);
                }
            }
        }
    }
}

/// Checks an object against its schema.
///
/// # Errors
/// The first field that does not fit.
pub fn check(schema: &Value, object: &Value) -> Result<(), String> {
    let mut object = object.clone();
    for field in ["apiVersion", "kind", "metadata"] {
        object.as_object_mut().map(|fields| fields.remove(field));
    }
    check_at(schema, &object, "")
}

fn check_at(schema: &Value, value: &Value, path: &str) -> Result<(), String> {
    let got = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "map",
    };
    let expected = |what: &str| Err(format!("{path}: expected {what}, got {got}"));
    match schema["type"].as_str().unwrap_or_default() {
        "object" => {
            let Value::Object(fields) = value else { return expected("map") };
            for (name, value) in fields {
                let inner = schema["properties"].get(name).or(schema.get("additionalProperties"));
                let Some(inner) = inner else {
                    return Err(format!("{path}.{name}: field not declared in schema"));
                };
                check_at(inner, value, &format!("{path}.{name}"))?;
            }
            Ok(())
        }
        "array" => {
            let Value::Array(items) = value else { return expected("list") };
            let items = items.iter().enumerate();
            items
                .into_iter()
                .try_for_each(|(index, item)| check_at(&schema["items"], item, &format!("{path}[{index}]")))
        }
        "string" if !value.is_string() => expected("string"),
        "boolean" if !value.is_boolean() => expected("boolean"),
        "integer" if !value.is_number() => expected("numeric (int or float)"),
        _ => Ok(()),
    }
}
