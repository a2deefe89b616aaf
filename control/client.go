// The control socket's client: what the command line talks to the daemon with.

package control

import (
	"context"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/url"
	"path/filepath"

	"blksnap/store"
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

// resource is what has a name: a device or a snapshot.
type resource struct{ kind, name string }

func deviceNamed(name string) resource   { return resource{"device", name} }
func snapshotNamed(name string) resource { return resource{"snapshot", name} }

// path is where the resource is. What cannot be a name is none: a path with it, such
// as /devices/.., is that of something else.
func (r resource) path() (string, error) {
	if !isName(r.name) {
		return "", unknown(r.kind, r.name)
	}
	return "/" + r.kind + "s/" + r.name, nil
}

// callOf is call for something that r has.
func (c *Client) callOf(ctx context.Context, method string, r resource, of string, in, out any) error {
	path, err := r.path()
	if err != nil {
		return err
	}
	return c.call(ctx, method, path+of, in, out)
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
	return v, c.callOf(ctx, "GET", deviceNamed(name), "", nil, &v)
}

// AddDevice puts [NAME=]ORIGIN under tracking.
func (c *Client) AddDevice(ctx context.Context, arg string, conf DeviceConfig) (v DeviceInfo, err error) {
	name, origin, err := splitOrigin(arg)
	if err != nil {
		return v, err
	}
	return v, c.call(ctx, "POST", "/devices", DeviceRequest{name, origin, conf}, &v)
}

// AddPart adds a part to the snapstore.
func (c *Client) AddPart(ctx context.Context, text string, force bool) error {
	spec, err := store.ParseSpec(text)
	if err != nil {
		return err
	}
	if spec.Path != "" {
		if spec.Path, err = filepath.Abs(spec.Path); err != nil {
			return fmt.Errorf("find snapstore: %w", err)
		}
	}
	return c.call(ctx, "POST", "/store", PartRequest{spec.String(), force}, nil)
}

// RemoveDevice ends a device's tracking. Its origin stays as it is.
func (c *Client) RemoveDevice(ctx context.Context, name string) error {
	return c.callOf(ctx, "DELETE", deviceNamed(name), "", nil, nil)
}

// ResizeDevice makes a device as long as its origin is, which is cut to shrink bytes
// before, if that is not 0.
func (c *Client) ResizeDevice(ctx context.Context, name string, shrink int64) (v DeviceInfo, err error) {
	return v, c.callOf(ctx, "POST", deviceNamed(name), "/resize", ResizeRequest{shrink}, &v)
}

// Changes describes a device's change tracking.
func (c *Client) Changes(ctx context.Context, device string) (v ChangesInfo, err error) {
	return v, c.callOf(ctx, "GET", deviceNamed(device), "/cbt", nil, &v)
}

// Extents yields what a copy of a device has to read, in order and disjoint.
// The error is one for which ErrFullRead holds where the changes are not
// known.
func (c *Client) Extents(ctx context.Context, device string, q ExtentsQuery) iter.Seq2[Extent, error] {
	v := url.Values{"since": {string(q.Since)}}
	if q.At != "" {
		v.Set("at", q.At)
	}
	if q.Generation != "" {
		v.Set("generation", q.Generation)
	}
	path, err := deviceNamed(device).path()
	if err != nil {
		return func(yield func(Extent, error) bool) { yield(Extent{}, err) }
	}
	return lines[Extent](ctx, c, path+"/cbt/extents?"+v.Encode())
}

// Mark makes ranges of a device count as changed.
func (c *Client) Mark(ctx context.Context, device string, ranges []Range) error {
	return c.callOf(ctx, "POST", deviceNamed(device), "/cbt/mark", MarkRequest{ranges}, nil)
}

// ResetChanges begins a new generation of a device's change tracking.
func (c *Client) ResetChanges(ctx context.Context, device string) error {
	return c.callOf(ctx, "POST", deviceNamed(device), "/cbt/reset", nil, nil)
}

// Snapshots are sorted by age, the oldest first.
func (c *Client) Snapshots(ctx context.Context) (l []SnapshotInfo, err error) {
	return l, c.call(ctx, "GET", "/snapshots", nil, &l)
}

// Snapshot describes one snapshot.
func (c *Client) Snapshot(ctx context.Context, name string) (v SnapshotInfo, err error) {
	return v, c.callOf(ctx, "GET", snapshotNamed(name), "", nil, &v)
}

// TakeSnapshot takes a snapshot of the named devices, or of all of them.
func (c *Client) TakeSnapshot(ctx context.Context, q SnapshotRequest) (v SnapshotInfo, err error) {
	return v, c.call(ctx, "POST", "/snapshots", q, &v)
}

// RollBack makes devices what they were at a snapshot: those that are named, or all of
// its devices. With clients on one it is refused without force.
func (c *Client) RollBack(ctx context.Context, name string, devices []string, force bool) (v RollbackInfo, err error) {
	return v, c.callOf(ctx, "POST", snapshotNamed(name), "/rollback", RollbackRequest{devices, force}, &v)
}

// DestroySnapshots destroys snapshots. Those in use are refused without force.
func (c *Client) DestroySnapshots(ctx context.Context, names []string, force bool) error {
	return c.call(ctx, "POST", "/snapshots/destroy", DestroyRequest{names, force}, nil)
}

// Store describes the parts of the snapstore, in order of preference.
func (c *Client) Store(ctx context.Context) (l []PartInfo, err error) {
	return l, c.call(ctx, "GET", "/store", nil, &l)
}

// Inspect has the daemon verify its state.
func (c *Client) Inspect(ctx context.Context) (l []StateProblem, err error) {
	return l, c.call(ctx, "GET", "/state/check", nil, &l)
}

// Events yields the remembered events and, with follow, new ones until ctx
// ends or the daemon stops.
func (c *Client) Events(ctx context.Context, follow bool) iter.Seq2[Event, error] {
	if follow {
		return lines[Event](ctx, c, "/events?follow")
	}
	return lines[Event](ctx, c, "/events")
}
