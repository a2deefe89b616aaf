package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// TestAPI walks through what the command line does, over a real socket.
func TestAPI(t *testing.T) {
	d := newTestDaemon(t, "vda")
	c := serveTest(t, d)
	ctx := t.Context()

	added, err := c.AddDevice(ctx, "vdb="+makeOrigin(t, 2<<20), DeviceConfig{TrackingBlock: 4096, StoreWait: new(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := [3]int64{added.Size, added.CBT.BlockSize, int64(added.StoreWait)}, [3]int64{2 << 20, 4096, int64(time.Second)}; got != want {
		t.Errorf("size, tracking block and wait for space of the device added\n got %v\nwant %v", got, want)
	}
	list, err := c.Devices(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"vda", "vdb"}, names(list, func(v DeviceInfo) string { return v.Name })); diff != "" {
		t.Errorf("devices, -want +got:\n%s", diff)
	}

	first, err := c.TakeSnapshot(ctx, SnapshotRequest{Name: "first"})
	if err != nil {
		t.Fatal(err)
	}
	write(t, d, "vdb", strings.Repeat("x", 8192), 4096)
	if _, err := c.TakeSnapshot(ctx, SnapshotRequest{Name: "second", Devices: []string{"vdb"}}); err != nil {
		t.Fatal(err)
	}
	writable, err := c.TakeSnapshot(ctx, SnapshotRequest{Name: "third", Devices: []string{"vda"}, Writable: true})
	if err != nil || !writable.Writable || first.Writable {
		t.Errorf("writable snapshots: %v\n got first: %v, third: %v\nwant the third alone", err, first.Writable, writable.Writable)
	}
	since := Since(fmt.Sprint(first.Images[1].CBT.Number))
	extents, err := collect(c.Extents(ctx, "vdb", ExtentsQuery{Since: since, At: "second"}))
	if diff := cmp.Diff([]Extent{{4096, 8192, "data"}}, extents); diff != "" || err != nil {
		t.Errorf("extents since the first snapshot: %v, -want +got:\n%s", err, diff)
	}
	vdb, err := c.Device(ctx, "vdb")
	if err != nil {
		t.Fatal(err)
	}
	want := added
	want.Snapshots = []string{"first", "second"}
	want.CBT.Number = added.CBT.Number + 2
	if diff := cmp.Diff(want, vdb); diff != "" {
		t.Errorf("device vdb, -want +got:\n%s", diff)
	}
	again, err := c.Snapshot(ctx, "first")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again, cmpopts.IgnoreFields(ImageInfo{}, "Holds", "Shares"), cmpopts.IgnoreFields(SnapshotInfo{}, "Store")); diff != "" {
		t.Errorf("snapshot when taken and when shown, -want +got:\n%s", diff)
	}

	if err := c.Mark(ctx, "vdb", []Range{{0, 1}, {1 << 20, 4096}}); err != nil {
		t.Fatal(err)
	}
	extents, err = collect(c.Extents(ctx, "vdb", ExtentsQuery{Since: Since(fmt.Sprint(vdb.CBT.Number))}))
	if diff := cmp.Diff([]Extent{{0, 4096, "zero"}, {1 << 20, 4096, "zero"}}, extents); diff != "" || err != nil {
		t.Errorf("extents marked by hand: %v, -want +got:\n%s", err, diff)
	}
	if err := c.ResetChanges(ctx, "vdb"); err != nil {
		t.Fatal(err)
	}
	changes, err := c.Changes(ctx, "vdb")
	if err != nil {
		t.Fatal(err)
	}
	if changes.Generation == vdb.CBT.Generation || changes.Base <= vdb.CBT.Number {
		t.Errorf("changes after a reset of %+v\n got %+v\nwant a new generation that begins above the last number", vdb.CBT, changes)
	}
	if _, err := collect(c.Extents(ctx, "vdb", ExtentsQuery{Since: Since(fmt.Sprint(vdb.CBT.Number))})); !errors.Is(err, ErrFullRead) {
		t.Errorf("extents since a number of the generation before\n got %v\nwant %v", err, ErrFullRead)
	}

	if err := c.DestroySnapshots(ctx, []string{"first", "second", "third"}, false); err != nil {
		t.Fatal(err)
	}
	if err := c.RemoveDevice(ctx, "vdb"); err != nil {
		t.Fatal(err)
	}
	parts, err := c.Store(ctx)
	if diff := cmp.Diff([]PartInfo{{"mem", 8 << 20, 0, 8 << 20, "ok"}}, parts); diff != "" || err != nil {
		t.Errorf("snapstore at the end: %v, -want +got:\n%s", err, diff)
	}
	v, err := c.Version(ctx)
	if v.Version != "0.0.0-test" || v.Stopping || err != nil {
		t.Errorf("version\n got %+v, %v\nwant 0.0.0-test, not stopping", v, err)
	}
}

func names[T any](l []T, name func(T) string) (names []string) {
	for _, v := range l {
		names = append(names, name(v))
	}
	return names
}

// TestAPIErrors checks that errors say the same on both sides of the socket and
// lead to the right exit status.
func TestAPIErrors(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb")
	c := serveTest(t, d)
	take(t, d, "taken")
	ctx := t.Context()
	origin := makeOrigin(t, 1<<20)
	vda, err := c.Device(ctx, "vda")
	if err != nil {
		t.Fatal(err)
	}
	extents := func(q ExtentsQuery) error {
		_, err := collect(c.Extents(ctx, "vda", q))
		return err
	}
	var many []string // more than a request's line has room for
	for n := range 2000 {
		many = append(many, fmt.Sprintf("%064d", n))
	}
	for _, tc := range []struct {
		name   string
		err    error
		is     error
		status int
		text   string
	}{
		{"unknown device", second(c.Device(ctx, "nope")), syscall.ENOENT, 1, `there is no device "nope"`},
		{"device name with a slash", second(c.Device(ctx, "../x")), syscall.ENOENT, 1, `there is no device "../x"`},
		{"device without a name", second(c.Changes(ctx, "")), syscall.ENOENT, 1, `there is no device ""`},
		{"device that is a path", c.RemoveDevice(ctx, ".."), syscall.ENOENT, 1, `there is no device ".."`},
		{"snapshot that is a path", second(c.Snapshot(ctx, ".")), syscall.ENOENT, 1, `there is no snapshot "."`},
		{"rollback to nothing", second(c.RollBack(ctx, "", nil, false)), syscall.ENOENT, 1, `there is no snapshot ""`},
		{"device exists", second(c.AddDevice(ctx, "vda="+origin, DeviceConfig{})), syscall.EEXIST, 1, "device vda exists already"},
		{"origin in use", second(c.AddDevice(ctx, "x="+vda.Origin, DeviceConfig{})), syscall.EBUSY, 1,
			"add device x: origin " + vda.Origin + " is device vda already"},
		{"bad tracking block", second(c.AddDevice(ctx, "x="+origin, DeviceConfig{TrackingBlock: 5000})), syscall.EINVAL, 1,
			"tracking block of 5000 bytes is not a power of two from 4KiB to 16MiB"},
		{"device with a snapshot", c.RemoveDevice(ctx, "vda"), syscall.EBUSY, 1, "device vda has 1 snapshot: taken"},
		{"snapshot exists", second(c.TakeSnapshot(ctx, SnapshotRequest{Name: "taken"})), syscall.EEXIST, 1, "snapshot taken exists already"},
		{"snapshot of an unknown device", second(c.TakeSnapshot(ctx, SnapshotRequest{Name: "x", Devices: []string{"vda", "nope"}})), syscall.ENOENT, 1, `there is no device "nope"`},
		{"reserved name", second(c.TakeSnapshot(ctx, SnapshotRequest{Name: "latest"})), syscall.EINVAL, 1, `snapshot name "latest" is reserved`},
		{"unknown snapshot", second(c.Snapshot(ctx, "nope")), syscall.ENOENT, 1, `there is no snapshot "nope"`},
		{"destroy one that does not exist", c.DestroySnapshots(ctx, []string{"taken", "nope"}, false), syscall.ENOENT, 1, `there is no snapshot "nope"`},
		{"destroy many", c.DestroySnapshots(ctx, many, false), syscall.ENOENT, 1, `there is no snapshot "` + many[0] + `"`},
		{"range beyond the end", c.Mark(ctx, "vda", []Range{{0, 1}, {1 << 20, 1}}), syscall.EINVAL, 1, "range 1048576:1 is not inside the device's 1048576 bytes"},
		{"extents of nothing", extents(ExtentsQuery{Since: "x"}), syscall.EINVAL, 1, `since "x" is neither a snapshot's number nor all`},
		{"number in another form", extents(ExtentsQuery{Since: "007"}), syscall.EINVAL, 1, `since "007" is neither a snapshot's number nor all`},
		{"extents at an unknown snapshot", extents(ExtentsQuery{Since: "all", At: "nope"}), syscall.ENOENT, 1, `there is no snapshot "nope"`},
		{"since before the base", extents(ExtentsQuery{Since: "1"}), ErrFullRead, 3,
			fmt.Sprintf("changes of vda since 1 are not known, only since %d to %d: a full read is due", vda.CBT.Base, vda.CBT.Number)},
		{"since what is still to come", extents(ExtentsQuery{Since: Since(fmt.Sprint(vda.CBT.Number + 1))}), ErrFullRead, 3,
			fmt.Sprintf("changes of vda since %d are not known, only since %d to %d: a full read is due", vda.CBT.Number+1, vda.CBT.Base, vda.CBT.Number)},
		{"another generation", extents(ExtentsQuery{Since: "all", Generation: "other"}), ErrFullRead, 3,
			"device vda is in generation " + vda.CBT.Generation + ", not other: a full read is due"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wantError(t, "error", tc.err, tc.text)
			if !errors.Is(tc.err, tc.is) {
				t.Errorf("kind of %v\n got %#v\nwant %v", tc.err, tc.err, tc.is)
			}
			if got := ExitStatus(tc.err); got != tc.status {
				t.Errorf("exit status of %v\n got %d\nwant %d", tc.err, got, tc.status)
			}
		})
	}
	if got := d.snapshotInfos(); len(got) != 1 || got[0].Name != "taken" {
		t.Errorf("snapshots after refused requests\n got %+v\nwant taken alone", got)
	}
}

func second[T any](_ T, err error) error { return err }

// TestAPIBounds sends what no client of ours sends.
func TestAPIBounds(t *testing.T) {
	c := serveTest(t, newTestDaemon(t, "vda"))
	for _, tc := range []struct {
		name, method, path, body string
		status                   int
	}{
		{"no JSON", "POST", "/snapshots", "snapshot please", http.StatusBadRequest},
		{"unknown key", "POST", "/snapshots", `{"name":"x","force":true}`, http.StatusBadRequest},
		{"too long a body", "POST", "/snapshots", `{"name":"x",` + strings.Repeat(" ", maxRequest) + `"devices":[]}`, http.StatusBadRequest},
		{"long name", "POST", "/snapshots", `{"name":"` + strings.Repeat("x", maxRequest/2) + `"}`, http.StatusBadRequest},
		{"relative origin", "POST", "/devices", `{"name":"x","origin":"disk.img"}`, http.StatusBadRequest},
		{"range that overflows", "POST", "/devices/vda/cbt/mark", `{"ranges":["4096:9223372036854775807"]}`, http.StatusBadRequest},
		{"range without a length", "POST", "/devices/vda/cbt/mark", `{"ranges":["4096"]}`, http.StatusBadRequest},
		{"unknown path", "GET", "/admin", "", http.StatusNotFound},
		{"wrong method", "PUT", "/devices", "", http.StatusMethodNotAllowed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			q, err := http.NewRequestWithContext(t.Context(), tc.method, "http://blksnap"+tc.path, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			r, err := c.http.Do(q)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			text, _ := io.ReadAll(r.Body)
			if r.StatusCode != tc.status || len(text) > 1024 {
				t.Errorf("%s %s\n got %d, %d bytes: %.100s\nwant %d and a short text", tc.method, tc.path, r.StatusCode, len(text), text, tc.status)
			}
		})
	}
	if l, err := c.Snapshots(t.Context()); len(l) != 0 || err != nil {
		t.Errorf("snapshots after bad requests\n got %+v, %v\nwant none", l, err)
	}
}

// TestUnreachable asks daemons that are not there.
func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	_, err := NewClient(dir + "/none.sock").Devices(t.Context())
	wantError(t, "no socket", err, "no daemon answers on "+dir+"/none.sock: no such file or directory")

	l, err := net.Listen("unix", dir+"/stale.sock")
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	_, err = NewClient(dir + "/stale.sock").Devices(t.Context())
	wantError(t, "socket of a killed daemon", err, "no daemon answers on "+dir+"/stale.sock: connection refused")
}

// TestStreamCutOff ends a stream in its middle: what was read so far must not
// look like all there is.
func TestStreamCutOff(t *testing.T) {
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
			return
		}
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		line, _ := json.Marshal(Extent{0, 4096, "data"})
		fmt.Fprintf(conn, "%x\r\n%s\n\r\n", len(line)+1, line)
	}()
	got, err := collect(NewClient(path).Extents(t.Context(), "vda", ExtentsQuery{Since: "all"}))
	if len(got) != 1 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("stream that was cut off\n got %v, %v\nwant one extent and %v", got, err, io.ErrUnexpectedEOF)
	}
}

// TestFollow follows events while they happen, until the daemon stops.
func TestFollow(t *testing.T) {
	d := newTestDaemon(t, "vda")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := serveTest(t, d)
	var kinds []string
	for e, err := range c.Events(ctx, true) {
		if err != nil {
			if ctx.Err() == nil {
				t.Errorf("follow the events: %v", err)
			}
			break
		}
		kinds = append(kinds, e.Kind+" "+e.Snapshot)
		switch len(kinds) {
		case 2: // all that had happened before
			take(t, d, "a")
		case 3:
			if err := d.destroy("a", false); err != nil {
				t.Error(err)
			}
		case 4:
			cancel()
		}
	}
	want := []string{"generation ", "device-added ", "snapshot-created a", "snapshot-destroyed a"}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("events, -want +got:\n%s", diff)
	}
}

// TestTakeForNobody takes a snapshot whose client has left before it was there: it does
// not stay.
func TestTakeForNobody(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	connected := context.WithValue(t.Context(), connKey{}, conn)
	ended, leave := context.WithCancel(t.Context())
	leave()
	d := newTestDaemon(t, "vda")
	take := func(what string, ctx context.Context, want error) {
		t.Helper()
		if _, err := d.takeSnapshot(ctx, SnapshotRequest{Name: "s"}); !errors.Is(err, want) {
			t.Errorf("take for %s\n got %v\nwant %v", what, err, want)
		}
		if got, there := len(d.snapshotInfos()) > 0, want == nil; got != there {
			t.Errorf("after it was taken for %s the snapshot exists\n got %v\nwant %v", what, got, there)
		}
	}
	take("a client that has left, as net/http knows", ended, context.Canceled)
	take("one that waits", connected, nil)
	if err := d.destroy("s", false); err != nil {
		t.Fatal(err)
	}
	client.Close()
	take("one that has left, as only the kernel knows", connected, context.Canceled)
}

// TestTakeForNobodyAnyMore serves clients that left before they were heard. There are
// many, because net/http may be quick to find that out.
func TestTakeForNobodyAnyMore(t *testing.T) {
	d := newTestDaemon(t, "vda")
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	const clients = 50
	for range clients {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "POST /snapshots HTTP/1.1\r\nHost: blksnap\r\nContent-Length: 2\r\n\r\n{}")
		c.Close()
	}
	s := newServer(t.Context(), d)
	ended := make(chan bool, clients)
	s.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			ended <- true
		}
	}
	served := make(chan error, 1)
	go func() { served <- serveControl(s, l) }()
	for range clients {
		<-ended
	}
	if got := d.snapshotInfos(); len(got) != 0 {
		t.Errorf("%d snapshots are left of clients that had left before", len(got))
	}
	s.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
