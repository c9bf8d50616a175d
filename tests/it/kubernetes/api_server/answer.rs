//! The answer to each request.
//!
//! Owns status codes and messages. Does not know connections or users.
//!
//! Longer than 400 lines because the answers to all kinds of requests are read together.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::rights::{Named, Rights, Wanted};
use super::store::{Selector, Watch};
use super::{Inner, apply, objects};

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub content_type: String,
    pub accept: String,
    pub agent: String,
    pub body: Value,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: u16,
    content: Content,
    pub retry_after: Option<u64>,
    pub watch: Option<Watch>,
}

#[derive(Clone, Debug)]
enum Content {
    Json(Value),
    Text(String),
}

impl Answer {
    fn new(code: u16, content: Content) -> Self {
        Self { code, content, retry_after: None, watch: None }
    }

    pub fn ok(code: u16, body: Value) -> Self {
        Self::new(code, Content::Json(body))
    }

    pub fn text(code: u16, text: &str) -> Self {
        Self::new(code, Content::Text(text.into()))
    }

    /// A failure.
    pub fn status(code: u16, reason: &str, message: &str) -> Self {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "details": {}, "code": code,
        });
        if !reason.is_empty() {
            status["reason"] = reason.into();
        }
        Self::ok(code, status)
    }

    pub fn plain_status(code: u16, reason: &str, message: &str) -> Self {
        Self::status(code, reason, message).without("details")
    }

    fn without(mut self, field: &str) -> Self {
        if let Content::Json(Value::Object(fields)) = &mut self.content {
            fields.remove(field);
        }
        self
    }

    fn details(mut self, details: Value) -> Self {
        if let Content::Json(body) = &mut self.content {
            body["details"] = details;
        }
        self
    }

    pub fn after(mut self, seconds: Option<u64>) -> Self {
        self.retry_after = seconds;
        self
    }

    pub fn json(&self) -> Option<&Value> {
        match &self.content {
            Content::Json(body) => Some(body),
            Content::Text(_) => None,
        }
    }

    pub fn content_type(&self) -> &'static str {
        match self.content {
            Content::Json(_) => "application/json",
            Content::Text(_) => "text/plain; charset=utf-8",
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        match &self.content {
            Content::Json(body) => body.to_string().into_bytes(),
            Content::Text(text) => text.clone().into_bytes(),
        }
    }
}

/// The object has been changed since it was read.
pub fn conflict(path: &str) -> Answer {
    let named = Named::parse(path.split('?').next().unwrap_or_default());
    let (name, kind) =
        named.map(|named| (named.name.clone().unwrap_or_default(), named.qualified())).unwrap_or_default();
    let message = format!(
        "Operation cannot be fulfilled on {kind} \"{name}\": the object has been modified; please apply your changes to the latest version and try again"
    );
    Answer::status(409, "Conflict", &message).details(json!({ "name": name, "kind": kind }))
}

/// The event that tells a watcher to list again.
pub fn expired() -> Value {
    let status = Answer::plain_status(410, "Expired", "too old resource version: 1 (2)");
    json!({ "type": "ERROR", "object": status.json() })
}

/// The rights that a request needs, and its answer.
pub(crate) fn answer(inner: &mut Inner, asked: &Asked, user: &str, rights: &Rights) -> (Vec<Wanted>, Answer) {
    let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
    if path == "/version" {
        return (Vec::new(), Answer::ok(200, objects::version()));
    }
    let query = parse_query(query);
    let Some(named) = Named::parse(path) else { return (Vec::new(), not_served()) };
    let is_missing = inner.store.get(&object_path(&named, path)).is_none();
    let verb = match asked.method.as_str() {
        "GET" if named.name.is_some() => "get",
        "GET" if query.get("watch").is_some_and(|watch| watch == "true") => "watch",
        "GET" => "list",
        "POST" => "create",
        "PATCH" => "patch",
        "DELETE" if named.name.is_some() => "delete",
        _ => return (Vec::new(), Answer::status(405, "MethodNotAllowed", "method not allowed")),
    };
    let mut verbs = vec![verb];
    let is_apply = asked.content_type == "application/apply-patch+yaml";
    // An apply that creates an object needs the right to create it, too.
    if verb == "patch" && is_apply && is_missing {
        verbs.push("create");
    }
    let wanted: Vec<Wanted> = verbs
        .into_iter()
        .map(|verb| Wanted { verb, group: named.group.clone(), resource: named.with_subresource() })
        .collect();
    if let Some(refused) = wanted.iter().find(|wanted| !rights.allow(wanted)) {
        let refusal = forbidden(&named, refused.verb, user);
        return (wanted, refusal);
    }
    if !objects::is_served(&inner.store, &named) {
        return (wanted, not_served());
    }
    if inner.guards_owners && names_owner(&asked.body) && !rights.allow(&deletion(&named)) {
        let refusal = forbidden_owner(&named);
        return (wanted, refusal);
    }
    let answer = match verb {
        "get" if named.subresource.as_deref() == Some("log") => log(inner, &named, &query),
        "get" => match inner.store.get(path) {
            Some(object) if asked.accept.contains("as=PartialObjectMetadata") => {
                let metadata = &object["metadata"];
                let kind = json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata });
                Answer::ok(200, kind)
            }
            Some(object) => Answer::ok(200, object.clone()),
            None => not_found(&named),
        },
        "delete" => delete(inner, &named, path),
        "list" => list(inner, &named, path, &query, asked),
        "watch" => watch(inner, path, &query),
        "create" => create(inner, &named, path, asked, user),
        _ => patch(inner, &named, path, &query, asked, user),
    };
    (wanted, answer)
}

fn parse_query(query: &str) -> BTreeMap<String, String> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name.to_owned(), decoded(value))
    };
    query.split('&').filter(|part| !part.is_empty()).map(pair).collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'%' if rest.len() >= 2 => {
                let code =
                    std::str::from_utf8(&rest[..2]).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok());
                bytes.push(code.expect("a percent-encoded byte"));
                rest = &rest[2..];
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).expect("UTF-8")
}

fn selector(query: &BTreeMap<String, String>) -> Selector {
    let pairs = |name: &str| -> Vec<(String, String)> {
        let text = query.get(name).map(String::as_str).unwrap_or_default();
        let pairs = text.split(',').filter_map(|part| part.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    Selector { labels: pairs("labelSelector"), fields: pairs("fieldSelector") }
}

/// The path without the subresource.
fn object_path(named: &Named, path: &str) -> String {
    match &named.subresource {
        Some(sub) => path.trim_end_matches(sub).trim_end_matches('/').to_owned(),
        None => path.to_owned(),
    }
}

fn not_served() -> Answer {
    Answer::text(404, "404 page not found\n")
}

fn details(named: &Named) -> Value {
    let mut details = json!({ "kind": named.resource });
    if let Some(name) = &named.name {
        details["name"] = name.as_str().into();
    }
    if !named.group.is_empty() {
        details["group"] = named.group.as_str().into();
    }
    details
}

fn not_found(named: &Named) -> Answer {
    let message =
        format!("{} \"{}\" not found", named.qualified(), named.name.as_deref().unwrap_or_default());
    Answer::status(404, "NotFound", &message).details(details(named))
}

fn forbidden(named: &Named, verb: &str, user: &str) -> Answer {
    let what = match &named.name {
        Some(name) => format!("{} \"{name}\"", named.qualified()),
        None => named.qualified(),
    };
    let scope = match &named.namespace {
        Some(namespace) => format!("in the namespace \"{namespace}\""),
        None => "at the cluster scope".into(),
    };
    let message = format!(
        "{what} is forbidden: User \"{user}\" cannot {verb} resource \"{}\" in API group \"{}\" {scope}",
        named.with_subresource(),
        named.group
    );
    Answer::status(403, "Forbidden", &message).details(details(named))
}

fn delete(inner: &mut Inner, named: &Named, path: &str) -> Answer {
    let Some(object) = inner.store.get(path) else { return not_found(named) };
    if named.resource == "pods" {
        // It stays until its kubelet has ended it.
        let mut pod = object.clone();
        pod["metadata"]["deletionTimestamp"] = "2026-11-23T20:57:48Z".into();
        pod["metadata"]["deletionGracePeriodSeconds"] = 30.into();
        return Answer::ok(200, inner.store.put(path, pod));
    }
    let mut details = details(named);
    details["uid"] = object["metadata"]["uid"].clone();
    inner.store.remove(path);
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details });
    Answer::ok(200, status)
}

fn names_owner(body: &Value) -> bool {
    body["metadata"]["ownerReferences"].as_array().is_some_and(|owners| !owners.is_empty())
}

fn deletion(named: &Named) -> Wanted {
    Wanted { verb: "delete", group: named.group.clone(), resource: named.with_subresource() }
}

/// The admission plugin OwnerReferencesPermissionEnforcement.
fn forbidden_owner(named: &Named) -> Answer {
    let name = named.name.as_deref().unwrap_or_default();
    let message = format!(
        "{} \"{name}\" is forbidden: cannot set an ownerRef on a resource you can't delete: , <nil>",
        named.qualified()
    );
    Answer::status(403, "Forbidden", &message).details(details(named))
}

fn log(inner: &Inner, named: &Named, query: &BTreeMap<String, String>) -> Answer {
    let of = format!(
        "{}/{}",
        named.name.as_deref().unwrap_or_default(),
        query.get("container").map(String::as_str).unwrap_or_default()
    );
    let text =
        inner.logs.iter().find(|(name, _)| *name == of).map(|(_, text)| text.as_str()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = query.get("tailLines").and_then(|tail| tail.parse().ok()).unwrap_or(lines.len());
    Answer::text(200, &format!("{}\n", lines[lines.len().saturating_sub(tail)..].join("\n")))
}

fn list(inner: &Inner, named: &Named, path: &str, query: &BTreeMap<String, String>, asked: &Asked) -> Answer {
    let mut items = inner.store.list(path, &selector(query));
    let version = inner.store.version().to_string();
    if asked.accept.contains("as=Table") {
        return Answer::ok(200, objects::table(&inner.store, named, &items, &version));
    }
    let mut metadata = json!({ "resourceVersion": version });
    let from = query.get("continue").and_then(|token| token.parse().ok()).unwrap_or(0_usize);
    if let Some(limit) = query.get("limit").and_then(|limit| limit.parse::<usize>().ok()) {
        let left = items.len().saturating_sub(from + limit);
        items = items.into_iter().skip(from).take(limit).collect();
        if left > 0 {
            metadata["continue"] = (from + limit).to_string().into();
            metadata["remainingItemCount"] = left.into();
        }
    }
    for item in &mut items {
        // Items of a list have no kind.
        if let Some(item) = item.as_object_mut() {
            item.remove("kind");
            item.remove("apiVersion");
        }
    }
    let kind = format!("{}List", objects::kind(&inner.store, named));
    let version = if named.group.is_empty() { "v1".into() } else { format!("{}/v1", named.group) };
    Answer::ok(200, json!({ "kind": kind, "apiVersion": version, "metadata": metadata, "items": items }))
}

fn watch(inner: &Inner, path: &str, query: &BTreeMap<String, String>) -> Answer {
    let number = |name: &str| query.get(name).and_then(|number| number.parse::<u64>().ok());
    let version = number("resourceVersion").unwrap_or(0);
    if version < inner.store.oldest {
        return Answer::text(200, &format!("{}\n", expired()));
    }
    let mut answer = Answer::ok(200, Value::Null);
    answer.watch = Some(Watch {
        collection: path.to_owned(),
        selector: selector(query),
        version,
        seconds: number("timeoutSeconds").unwrap_or(60),
    });
    answer
}

/// Returns the refusal of an admission policy.
fn denied(inner: &Inner, named: &Named, user: &str, operation: &str, object: &Value) -> Option<Answer> {
    let (policy, message) = inner.admission.as_ref()?.denial(named, user, operation, object)?;
    let message = format!(
        "{} \"{}\" is forbidden: ValidatingAdmissionPolicy '{policy}' with binding '{policy}' denied request: {message}",
        named.qualified(),
        named.name.as_deref().unwrap_or_default()
    );
    Some(Answer::status(422, "Invalid", &message).details(details(named)))
}

fn create(inner: &mut Inner, named: &Named, path: &str, asked: &Asked, user: &str) -> Answer {
    let mut object = asked.body.clone();
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let named = Named { name: Some(name.clone()), ..named.clone() };
    if let Some(namespace) = &named.namespace
        && !inner.store.get("/api/v1/namespaces").is_none_or(|all| all[namespace] == true)
    {
        let message = format!("namespaces \"{namespace}\" not found");
        let details = json!({ "name": namespace, "kind": "namespaces" });
        return Answer::status(404, "NotFound", &message).details(details);
    }
    if inner.store.get(&format!("{path}/{name}")).is_some() {
        let message = format!("{} \"{name}\" already exists", named.qualified());
        return Answer::status(409, "AlreadyExists", &message).details(details(&named));
    }
    objects::default(&named, &mut object);
    if let Some(refusal) = denied(inner, &named, user, "CREATE", &object) {
        return refusal;
    }
    if let Some(refusal) = invalid(&named, &object) {
        return refusal;
    }
    if objects::has_generation(&named) {
        object["metadata"]["generation"] = 1.into();
    }
    objects::note_manager(&mut object, asked.agent.split('/').next().unwrap_or_default());
    Answer::ok(201, inner.store.put(&format!("{path}/{name}"), object))
}

/// Returns the refusal of an invalid object.
fn invalid(named: &Named, object: &Value) -> Option<Answer> {
    let causes = objects::faults(named, object);
    let said = |cause: &objects::Cause| format!("{}: {}", cause.field, cause.message);
    let kind = object["kind"].as_str().unwrap_or_default();
    let name = named.name.as_deref().unwrap_or_default();
    let all = match causes.as_slice() {
        [] => return None,
        [cause] => said(cause),
        // Equal messages appear once.
        [first, rest @ ..] if rest.iter().all(|other| said(other) == said(first)) => said(first),
        causes => format!("[{}]", causes.iter().map(said).collect::<Vec<_>>().join(", ")),
    };
    let message = format!("{kind} \"{name}\" is invalid: {all}");
    let cause = |cause: &objects::Cause| json!({ "reason": cause.reason, "message": cause.message, "field": cause.field });
    let causes: Vec<Value> = causes.iter().map(cause).collect();
    let details = json!({ "name": name, "kind": kind, "causes": causes });
    Some(Answer::status(422, "Invalid", &message).details(details))
}

fn patch(
    inner: &mut Inner,
    named: &Named,
    path: &str,
    query: &BTreeMap<String, String>,
    asked: &Asked,
    user: &str,
) -> Answer {
    let at = object_path(named, path);
    let old = inner.store.get(&at).cloned();
    let patched = match asked.content_type.as_str() {
        "application/apply-patch+yaml" => {
            let manager = query.get("fieldManager").cloned().unwrap_or_default();
            let schema = objects::schema(&inner.store, named);
            match apply::apply(old.as_ref(), &asked.body, &manager, schema.as_ref(), named) {
                Ok(object) => Some(object),
                Err(message) => return Answer::status(500, "", &message).without("details"),
            }
        }
        kind => {
            let Some(old) = &old else { return not_found(named) };
            match kind {
                "application/json-patch+json" => apply::json_patch(old.clone(), &asked.body),
                "application/merge-patch+json" => Some(apply::merge_patch(old.clone(), &asked.body)),
                _ => return Answer::status(415, "UnsupportedMediaType", "unsupported"),
            }
        }
    };
    let Some(mut object) = patched else {
        let message = "the server rejected our request due to an error in our request";
        return Answer::status(422, "Invalid", message);
    };
    if let Some(old) = &old {
        let claimed = object["metadata"]["resourceVersion"].clone();
        if claimed != old["metadata"]["resourceVersion"] && !claimed.is_null() {
            return conflict(path);
        }
        if named.resource == "nodes" {
            // A change of the other part is dropped without an error.
            match named.subresource.as_deref() {
                Some("status") => object["spec"] = old["spec"].clone(),
                _ => object["status"] = old["status"].clone(),
            }
            objects::default_allocatable(&mut object);
        }
    }
    let operation = if old.is_some() { "UPDATE" } else { "CREATE" };
    if let Some(refusal) = denied(inner, named, user, operation, &object) {
        return refusal;
    }
    if let Some(refusal) = invalid(named, &object) {
        return refusal;
    }
    if old.is_none() {
        objects::default(named, &mut object);
    }
    if old.as_ref() == Some(&object) {
        return Answer::ok(200, object);
    }
    let generation = old.as_ref().map_or(0, |old| old["metadata"]["generation"].as_i64().unwrap_or(0));
    if objects::has_generation(named) {
        object["metadata"]["generation"] = (generation + 1).into();
    }
    Answer::ok(if old.is_some() { 200 } else { 201 }, inner.store.put(&at, object))
}
