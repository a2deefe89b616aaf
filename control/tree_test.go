package control

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestTreeTellsSnapshotsApart takes a snapshot under a name that was used
// before. The tree must see that it is another one.
func TestTreeTellsSnapshotsApart(t *testing.T) {
	d := newTestDaemon(t, "vda")
	src := treeSource{d}
	if err := src.Take("s"); err != nil {
		t.Fatal(err)
	}
	first, _ := src.Snapshot("s")
	if again, ok := src.Snapshot("s"); !ok || again != first {
		t.Errorf("the same snapshot looked up twice\n got %v and %v\nwant them equal", first, again)
	}
	image, _ := first.Image("vda")
	if again, _ := first.Image("vda"); again != image {
		t.Errorf("the same image looked up twice\n got %v and %v\nwant them equal", image, again)
	}
	if err := src.Destroy("s"); err != nil {
		t.Fatal(err)
	}
	if err := src.Take("s"); err != nil {
		t.Fatal(err)
	}
	if later, ok := src.Snapshot("s"); !ok || later == first {
		t.Error("a later snapshot of the same name is taken for the first")
	}
	dev, _ := src.Device("vda")
	if again, _ := src.Device("vda"); again != dev {
		t.Error("the same device looked up twice is not equal")
	}
}

// TestTreeErrors checks that mkdir and rmdir get the errno that users know.
func TestTreeErrors(t *testing.T) {
	d := newTestDaemon(t, "vda")
	src := treeSource{d}
	take(t, d, "s")
	empty := treeSource{newTestDaemon(t)}
	stopped := newTestDaemon(t, "vda")
	stopped.stop()
	for _, tc := range []struct {
		name string
		got  error
		want error
	}{
		{"mkdir of what exists", src.Take("s"), syscall.EEXIST},
		{"mkdir of a bad name", src.Take(".s"), syscall.EINVAL},
		{"mkdir of a reserved name", src.Take("latest"), syscall.EINVAL},
		{"mkdir without a name", src.Take(""), syscall.EINVAL},
		{"mkdir without devices", empty.Take("s"), syscall.EINVAL},
		{"mkdir while stopping", treeSource{stopped}.Take("s"), syscall.ESHUTDOWN},
		{"rmdir of what is not there", src.Destroy("x"), syscall.ENOENT},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if !errors.Is(tc.got, tc.want) {
				t.Errorf("error\n got %v\nwant %v", tc.got, tc.want)
			}
		})
	}
}

// TestTreeLists checks names, their order, and which snapshots since/ lists.
func TestTreeLists(t *testing.T) {
	d := newTestDaemon(t, "vdb", "vda")
	src := treeSource{d}
	if got := src.Latest(); got != "" {
		t.Errorf("latest before the first snapshot\n got %q\nwant none", got)
	}
	for _, name := range []string{"z", "b", "a"} {
		take(t, d, name)
	}
	if _, err := d.take(SnapshotRequest{Name: "k", Devices: []string{"vdb"}}); err != nil {
		t.Fatal(err)
	}
	if err := d.destroy("b", false); err != nil {
		t.Fatal(err)
	}
	c, err := d.changesInfo("vda")
	if err != nil {
		t.Fatal(err)
	}
	a, _ := src.Snapshot("a")
	image, _ := a.Image("vda")
	z, _ := src.Snapshot("z")
	older, _ := z.Image("vda")
	live, _ := src.Device("vda")
	for _, tc := range []struct {
		name      string
		got, want any
	}{
		{"devices", src.Devices(), []string{"vda", "vdb"}},
		{"snapshots", src.Snapshots(), []string{"a", "k", "z"}},
		{"latest", src.Latest(), "k"},
		{"images", a.Images(), []string{"vda", "vdb"}},
		{"numbers of the live device", live.Changes().Numbers(), []uint64{c.Base + 1, c.Base + 3}},
		{"numbers of the newest image", image.Changes().Numbers(), []uint64{c.Base + 1, c.Base + 3}},
		{"numbers of an older image", older.Changes().Numbers(), []uint64{c.Base + 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, tc.got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestNumbersNeverComeAgain removes a device that had more snapshots than
// seconds and adds it again: what a script kept of the first must be refused.
func TestNumbersNeverComeAgain(t *testing.T) {
	d := newTestDaemon(t, "vda")
	origin, err := d.deviceInfo("vda")
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		take(t, d, "s")
		if err := d.destroy("s", false); err != nil {
			t.Fatal(err)
		}
	}
	last, err := d.changesInfo("vda")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.removeDevice("vda"); err != nil {
		t.Fatal(err)
	}
	again, err := d.addDevice(t.Context(), DeviceRequest{Name: "vda", Origin: origin.Origin}, true)
	if err != nil {
		t.Fatal(err)
	}
	if again.CBT.Base < last.Number || again.CBT.Generation == last.Generation {
		t.Errorf("change tracking of a device added again\n got %+v\nwant a new generation from %d on", again.CBT, last.Number)
	}
	d.number = 1 << 60 // as if the clock had been set back since
	if got := d.firstNumber(); got <= d.number {
		t.Errorf("first number after %d\n got %d\nwant one above", d.number, got)
	}
}

// TestAddWaitsForRemoval adds a device while another one of that name is being removed: its
// files must not be taken for those that go.
func TestAddWaitsForRemoval(t *testing.T) {
	d := newTestDaemon(t, "vda")
	dev, err := d.takeOut("vda") // as the removal does
	if err != nil {
		t.Fatal(err)
	}
	q := DeviceRequest{Name: "vda", Origin: makeOrigin(t, 2<<20)}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.addDevice(ctx, q, true); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("add while the device is being removed, by one who does not wait: %v, want EBUSY", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := d.addDevice(t.Context(), q, true)
		done <- err
	}()
	if err := dev.Remove(); err != nil {
		t.Fatal(err)
	}
	d.removed("vda")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if info, err := d.deviceInfo("vda"); err != nil || info.Origin != q.Origin {
		t.Errorf("the device is %+v (%v), want %s", info, err, q.Origin)
	}
}

// TestSetInUse changes the set from many goroutines at once.
func TestSetInUse(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb")
	src := treeSource{d}
	done := make(chan struct{})
	for i, name := range []string{"a", "b", "c", "d"} {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 25 {
				if err := src.Take(name); err != nil {
					t.Errorf("take %s: %v", name, err)
				}
				if i == 0 { // a device that comes and goes
					if _, err := d.addDevice(t.Context(), DeviceRequest{Name: "vdc", Origin: "/nonexistent"}, true); err == nil {
						t.Error("add a device that does not exist: got no error")
					}
				}
				for _, n := range src.Snapshots() {
					if s, ok := src.Snapshot(n); ok {
						s.State()
					}
				}
				if err := src.Destroy(name); err != nil {
					t.Errorf("destroy %s: %v", name, err)
				}
			}
		}()
	}
	for range 4 {
		<-done
	}
	if got := src.Snapshots(); len(got) != 0 {
		t.Errorf("snapshots at the end\n got %v\nwant none", slices.Sorted(slices.Values(got)))
	}
}
