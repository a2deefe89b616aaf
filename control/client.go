// The control socket's client: what the command line talks to the daemon with.

package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
)

// Client talks to the daemon behind one control socket. Each call is a request
// of its own; there is nothing to close.
type Client struct {
	path string
	http http.Client
}

// NewClient returns a client of the daemon behind the control socket at path;
// empty: where it is by default.
func NewClient(path string) *Client {
	c := &Client{path: path}
	if path == "" {
		c.path = DefaultControl()
	}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
	}
	return c
}

// dial connects to the control socket. Where a user's sockets are below /tmp,
// which is everybody's, the directory must be that user's: somebody else's
// daemon is not to be told what is meant for ours.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	if p := defaultPlaces(); p.base != "" && c.path == DefaultControl() {
		if err := checkPrivate(p.base); err != nil {
			return nil, err
		}
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", c.path)
}

// Version asks who answers.
func (c *Client) Version(ctx context.Context) (v VersionInfo, err error) {
	return v, c.call(ctx, "GET", "/version", nil, &v)
}

// Devices are sorted by name.
func (c *Client) Devices(ctx context.Context) (l []DeviceInfo, err error) {
	return l, c.call(ctx, "GET", "/devices", nil, &l)
}

// Device describes one device.
func (c *Client) Device(ctx context.Context, name string) (v DeviceInfo, err error) {
	return v, c.call(ctx, "GET", "/devices/"+url.PathEscape(name), nil, &v)
}

// AddDevice puts [NAME=]ORIGIN under tracking.
func (c *Client) AddDevice(ctx context.Context, arg string, conf DeviceConfig) (v DeviceInfo, err error) {
	name, origin, err := splitOrigin(arg)
	if err != nil {
		return v, err
	}
	return v, c.call(ctx, "POST", "/devices", DeviceRequest{name, origin, conf}, &v)
}

// RemoveDevice ends a device's tracking. Its origin stays as it is.
func (c *Client) RemoveDevice(ctx context.Context, name string) error {
	return c.call(ctx, "DELETE", "/devices/"+url.PathEscape(name), nil, nil)
}

// Changes describes a device's change tracking.
func (c *Client) Changes(ctx context.Context, device string) (v ChangesInfo, err error) {
	return v, c.call(ctx, "GET", "/devices/"+url.PathEscape(device)+"/cbt", nil, &v)
}

// Extents yields what a copy of a device has to read, in order and disjoint.
// The error is one for which ErrFullRead holds where the changes are not
// known.
func (c *Client) Extents(ctx context.Context, device string, q ExtentsQuery) iter.Seq2[Extent, error] {
	v := url.Values{"since": {q.Since}}
	if q.At != "" {
		v.Set("at", q.At)
	}
	if q.Generation != "" {
		v.Set("generation", q.Generation)
	}
	return lines[Extent](ctx, c, "/devices/"+url.PathEscape(device)+"/cbt/extents?"+v.Encode())
}

// Mark makes ranges of a device count as changed.
func (c *Client) Mark(ctx context.Context, device string, ranges []Range) error {
	return c.call(ctx, "POST", "/devices/"+url.PathEscape(device)+"/cbt/mark", MarkRequest{ranges}, nil)
}

// ResetChanges begins a new generation of a device's change tracking.
func (c *Client) ResetChanges(ctx context.Context, device string) error {
	return c.call(ctx, "POST", "/devices/"+url.PathEscape(device)+"/cbt/reset", nil, nil)
}

// Snapshots are sorted by age, the oldest first.
func (c *Client) Snapshots(ctx context.Context) (l []SnapshotInfo, err error) {
	return l, c.call(ctx, "GET", "/snapshots", nil, &l)
}

// Snapshot describes one snapshot.
func (c *Client) Snapshot(ctx context.Context, name string) (v SnapshotInfo, err error) {
	return v, c.call(ctx, "GET", "/snapshots/"+url.PathEscape(name), nil, &v)
}

// TakeSnapshot takes a snapshot of the named devices, or of all of them.
func (c *Client) TakeSnapshot(ctx context.Context, name string, devices []string) (v SnapshotInfo, err error) {
	return v, c.call(ctx, "POST", "/snapshots", SnapshotRequest{name, devices}, &v)
}

// DestroySnapshots destroys snapshots. Those in use are refused without force.
func (c *Client) DestroySnapshots(ctx context.Context, names []string, force bool) error {
	v := url.Values{"name": names}
	if force {
		v.Set("force", "")
	}
	return c.call(ctx, "DELETE", "/snapshots?"+v.Encode(), nil, nil)
}

// Store describes the parts of the snapstore, in order of preference.
func (c *Client) Store(ctx context.Context) (l []PartInfo, err error) {
	return l, c.call(ctx, "GET", "/store", nil, &l)
}

// Events yields the remembered events and, with follow, new ones until ctx
// ends or the daemon stops.
func (c *Client) Events(ctx context.Context, follow bool) iter.Seq2[Event, error] {
	if follow {
		return lines[Event](ctx, c, "/events?follow")
	}
	return lines[Event](ctx, c, "/events")
}

// call sends one request, with in as JSON if it is not nil, and reads the
// answer into out if that is not nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return fmt.Errorf("write request: %w", err)
		}
	}
	r, err := c.send(ctx, method, path, &body)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(r.Body).Decode(out); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

// send sends one request and returns an answer that is not an error.
func (c *Client) send(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	q, err := http.NewRequestWithContext(ctx, method, "http://blksnap"+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	r, err := c.http.Do(q)
	if err != nil {
		return nil, c.unreachable(err)
	}
	if r.StatusCode == http.StatusOK {
		return r, nil
	}
	defer r.Body.Close()
	var e struct{ Error *Error }
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil || e.Error == nil {
		return nil, fmt.Errorf("the daemon answers %s", r.Status)
	}
	return nil, e.Error
}

// unreachable says in a line why the daemon did not answer.
func (c *Client) unreachable(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	err = plain(err)
	if s, ok := errors.AsType[*os.SyscallError](err); ok {
		err = s.Err
	}
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("no daemon answers on %s: %w", c.path, err)
	}
	return fmt.Errorf("ask the daemon on %s: %w", c.path, err)
}

// lines yields the lines of a streamed answer.
func lines[T any](ctx context.Context, c *Client, path string) iter.Seq2[T, error] {
	return func(yield func(v T, err error) bool) {
		var zero T
		r, err := c.send(ctx, "GET", path, nil)
		if err != nil {
			yield(zero, err)
			return
		}
		defer r.Body.Close()
		dec := json.NewDecoder(bufio.NewReader(r.Body))
		for {
			v, err := line[T](dec)
			if errors.Is(err, io.EOF) || !yield(v, err) || err != nil {
				return
			}
		}
	}
}

// line reads one line of a streamed answer: a value, or the error that ends it.
// io.EOF is the good end, which HTTP marks: an answer that was cut off ends with
// another error.
func line[T any](dec *json.Decoder) (v T, err error) {
	var raw json.RawMessage
	if err := dec.Decode(&raw); err != nil {
		return v, err
	}
	if bytes.HasPrefix(raw, []byte(`{"error":`)) {
		var e struct{ Error *Error }
		if err := json.Unmarshal(raw, &e); err != nil {
			return v, err
		}
		return v, e.Error
	}
	return v, json.Unmarshal(raw, &v)
}
