package control

import (
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"blksnap/intercept"
)

var seed = flag.Uint64("seed", rand.Uint64(), "seed of the random tests")

// open opens an export until the test ends.
func open(t *testing.T, d *Daemon, name string) intercept.Export {
	t.Helper()
	e, err := exports{d}.Open(t.Context(), name, "test")
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestOpenExport(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb")
	take(t, d, "s")
	if _, err := d.take(SnapshotRequest{Name: "only-b", Devices: []string{"vdb"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.take(SnapshotRequest{Name: "w", Devices: []string{"vda"}, Writable: true}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, export string
		readOnly     bool
		err          error
	}{
		{"live", "vda", false, nil},
		{"image", "vdb@s", true, nil},
		{"writable image", "vda@w", false, nil},
		{"no name where there are two", "", false, syscall.ENOENT},
		{"unknown device", "vdc", false, syscall.ENOENT},
		{"unknown snapshot", "vda@x", false, syscall.ENOENT},
		{"device that the snapshot has not", "vda@only-b", false, syscall.ENOENT},
		{"no device", "@s", false, syscall.ENOENT},
		{"no snapshot", "vda@", false, syscall.ENOENT},
		{"two snapshots", "vda@s@s", false, syscall.ENOENT},
		{"latest is a link of the tree", "vda@latest", false, syscall.ENOENT},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e, err := exports{d}.Open(t.Context(), tc.export, "test")
			if !errors.Is(err, tc.err) {
				t.Fatalf("open %q\n got %v\nwant %v", tc.export, err, tc.err)
			}
			if err != nil {
				return
			}
			defer e.Release()
			if e.Name != tc.export || e.Device.ReadOnly() != tc.readOnly {
				t.Errorf("open %q\n got %q, read-only: %v\nwant read-only: %v", tc.export, e.Name, e.Device.ReadOnly(), tc.readOnly)
			}
		})
	}
	want := []string{"vda", "vda@s", "vda@w", "vdb", "vdb@only-b", "vdb@s"}
	if diff := cmp.Diff(want, names(exports{d}.List(), func(e intercept.ExportInfo) string { return e.Name })); diff != "" {
		t.Errorf("list, -want +got:\n%s", diff)
	}
	if err := d.destroy("s", false); err != nil {
		t.Errorf("destroy a snapshot that was released: %v", err)
	}
}

func TestEmptyNameIsTheOnlyDevice(t *testing.T) {
	d := newTestDaemon(t, "vda")
	take(t, d, "s")
	e := open(t, d, "")
	defer e.Release()
	if e.Name != "vda" {
		t.Errorf("name of the only device\n got %q\nwant vda", e.Name)
	}
}

// TestDeviceInUse removes devices that clients have open.
func TestDeviceInUse(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb")
	a, b := open(t, d, "vda"), open(t, d, "vda")
	wantError(t, "remove a device with two clients", d.removeDevice("vda"), "device vda has 2 NBD connections open")
	a.Release()
	wantError(t, "remove a device with one client", d.removeDevice("vda"), "device vda has 1 NBD connection open")
	wantError(t, "remove a device that nobody uses", d.removeDevice("vdb"), "<nil>")
	b.Release()
	wantError(t, "remove a device that nobody uses any more", d.removeDevice("vda"), "<nil>")
	if _, err := (exports{d}).Open(t.Context(), "vda", "test"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("open a removed device\n got %v\nwant %v", err, syscall.ENOENT)
	}
}

// TestExportKeepsItsSize resizes a device that a client has open.
func TestExportKeepsItsSize(t *testing.T) {
	d := newTestDaemon(t, "vda")
	before := open(t, d, "vda")
	defer before.Release()
	dev, err := d.device("vda")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dev.Origin(), 2<<20); err != nil {
		t.Fatal(err)
	}
	info, err := d.resizeDevice("vda", ResizeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	after := open(t, d, "vda")
	defer after.Release()
	got, want := [3]int64{before.Device.Size(), after.Device.Size(), info.Size}, [3]int64{1 << 20, 2 << 20, 2 << 20}
	if got != want {
		t.Errorf("size of an export from before, of one from after, and of the device\n got %v\nwant %v", got, want)
	}
}

// TestSnapshotInUse destroys a snapshot that a client and the tree have open.
func TestSnapshotInUse(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb")
	take(t, d, "s")
	e := open(t, d, "vdb@s")
	if err := d.destroy("s", false); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("destroy a snapshot with a client\n got %v\nwant %v", err, syscall.EBUSY)
	}
	buf := make([]byte, 512)
	if err := e.Device.Read(buf, 0); err != nil {
		t.Errorf("read an image that could not be destroyed: %v", err)
	}
	snap, _ := treeSource{d}.Snapshot("s")
	file, _ := snap.Image("vda")
	if err := file.Acquire(); err != nil {
		t.Fatal(err)
	}
	e.Release()
	if err := (treeSource{d}).Destroy("s"); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("destroy a snapshot with an open file\n got %v\nwant %v", err, syscall.EBUSY)
	}
	e = open(t, d, "vdb@s")
	if err := d.destroy("s", true); err != nil {
		t.Errorf("destroy a snapshot by force: %v", err)
	}
	select {
	case <-e.Gone:
	default:
		t.Error("the export of a destroyed image does not say that it is gone")
	}
	if err := e.Device.Read(buf, 0); !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("read a destroyed image over NBD\n got %v\nwant %v", err, syscall.ESHUTDOWN)
	}
	if _, err := file.ReadAt(buf, 0); err == nil {
		t.Error("read a destroyed image in the tree: got no error")
	}
	e.Release()
	file.Release()
	if got := d.snapshotInfos(); len(got) != 0 {
		t.Errorf("snapshots\n got %+v\nwant none", got)
	}
}

// TestDestroySeveral destroys snapshots of which some are in use.
func TestDestroySeveral(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb")
	for _, name := range []string{"a", "b", "c", "d"} {
		take(t, d, name)
	}
	inA, inC := open(t, d, "vdb@a"), open(t, d, "vda@c")
	err := d.destroySnapshots(DestroyRequest{Names: []string{"c", "d", "a", "b", "a"}})
	if !errors.Is(err, syscall.EBUSY) {
		t.Errorf("destroy some that are in use\n got %v\nwant %v", err, syscall.EBUSY)
	}
	wantError(t, "destroy some that are in use", errors.New(OneLine(err)),
		"destroy snapshot a: image of vdb is in use: device or resource busy; destroy snapshot c: image of vda is in use: device or resource busy")
	if diff := cmp.Diff([]string{"a", "c"}, names(d.snapshotInfos(), func(v SnapshotInfo) string { return v.Name })); diff != "" {
		t.Errorf("snapshots left, -want +got:\n%s", diff)
	}
	inA.Release()
	inC.Release()
	wantError(t, "destroy them when they are not", d.destroySnapshots(DestroyRequest{Names: []string{"a", "c"}}), "<nil>")
}

// TestBlockStatus compares the extents of live devices and images, for random
// ranges, with a model of what was written in which interval.
func TestBlockStatus(t *testing.T) {
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(*seed, 0))
	const (
		size  = 1<<20 + 512 // the last tracking block is short
		block = 4096
	)
	d := newTestDaemon(t)
	if _, err := d.addDevice(t.Context(), DeviceRequest{"vda", makeOrigin(t, size), DeviceConfig{TrackingBlock: block}}, true); err != nil {
		t.Fatal(err)
	}
	info, err := d.deviceInfo("vda")
	if err != nil {
		t.Fatal(err)
	}
	var changed [size/block + 1]uint64 // interval of each block's last change, 0 for none
	for interval := uint64(1); interval <= 5; interval++ {
		for range 20 {
			off := rng.Int64N(size)
			n := 1 + rng.Int64N(min(3*block, size-off))
			write(t, d, "vda", string(make([]byte, n)), off)
			for b := off / block; b <= (off+n-1)/block; b++ {
				changed[b] = interval
			}
		}
		take(t, d, string('a'+rune(interval-1)))
	}
	want := func(off, n int64, since uint64) (extents []intercept.Extent) {
		for at := off; at < off+n; {
			end := min((at/block+1)*block, off+n)
			e := intercept.Extent{N: end - at}
			if changed[at/block] > since {
				e.Flags = stateDirty
			}
			if k := len(extents) - 1; k >= 0 && extents[k].Flags == e.Flags {
				extents[k].N += e.N
			} else {
				extents = append(extents, e)
			}
			at = end
		}
		return extents
	}
	for _, export := range []string{"vda", "vda@e"} {
		e := open(t, d, export)
		m := e.Device.(intercept.Mapper)
		for range 200 {
			since := uint64(rng.IntN(6))
			off := rng.Int64N(size)
			n := 1 + rng.Int64N(size-off)
			got, err := collect(m.Status(dirtyContext+decimal(info.CBT.Number+since), off, n))
			if diff := cmp.Diff(want(off, n, since), got); diff != "" || err != nil {
				t.Fatalf("%s: changed since %d in [%d, %d): %v, -want +got:\n%s", export, since, off, off+n, err, diff)
			}
		}
		e.Release()
	}
}

func TestContexts(t *testing.T) {
	d := newTestDaemon(t, "vda")
	for _, name := range []string{"a", "b", "c"} {
		take(t, d, name)
	}
	if err := d.destroy("b", false); err != nil {
		t.Fatal(err)
	}
	c, err := d.changesInfo("vda")
	if err != nil {
		t.Fatal(err)
	}
	context := func(num uint64) string { return dirtyContext + decimal(num) }
	for _, tc := range []struct {
		export  string
		listed  []string
		has     []string
		missing []string
	}{
		{
			"vda",
			[]string{allocationContext, context(c.Base + 1), context(c.Base + 3)},
			[]string{context(c.Base), context(c.Base + 2)},
			[]string{context(c.Base - 1), context(c.Base + 4), dirtyContext, dirtyContext + "+1", dirtyContext + "0" + decimal(c.Base), "base:", "qemu:allocation-depth"},
		},
		{
			"vda@a",
			[]string{allocationContext, context(c.Base + 1)},
			[]string{context(c.Base)},
			[]string{context(c.Base + 2)},
		},
	} {
		t.Run(tc.export, func(t *testing.T) {
			e := open(t, d, tc.export)
			defer e.Release()
			m := e.Device.(intercept.Mapper)
			if diff := cmp.Diff(tc.listed, m.Contexts()); diff != "" {
				t.Errorf("contexts listed, -want +got:\n%s", diff)
			}
			for _, name := range slices.Concat(tc.listed, tc.has) {
				if !m.HasContext(name) {
					t.Errorf("context %s is not offered", name)
				}
			}
			for _, name := range tc.missing {
				if m.HasContext(name) {
					t.Errorf("context %s is offered", name)
				}
				if got, err := collect(m.Status(name, 0, 512)); err == nil {
					t.Errorf("status of context %s\n got %v\nwant an error", name, got)
				}
			}
		})
	}
}

// TestLosingTheTree unmounts the tree under clients: the daemon is idle when
// the last one leaves, and only once.
func TestLosingTheTree(t *testing.T) {
	idle := func(d *Daemon) bool {
		select {
		case <-d.idle:
			return true
		default:
			return false
		}
	}
	t.Run("without clients", func(t *testing.T) {
		d := newTestDaemon(t, "vda")
		d.loseTree()
		if !idle(d) {
			t.Error("a daemon without tree and clients is not idle")
		}
		open(t, d, "vda").Release() // one that comes before the daemon stops
	})
	t.Run("with clients", func(t *testing.T) {
		d := newTestDaemon(t, "vda")
		take(t, d, "s")
		a, b := open(t, d, "vda"), open(t, d, "vda@s")
		d.loseTree()
		a.Release()
		if idle(d) {
			t.Error("a daemon with a client is idle")
		}
		b.Release()
		if !idle(d) {
			t.Error("a daemon whose last client has left is not idle")
		}
		open(t, d, "vda").Release()
	})
}
