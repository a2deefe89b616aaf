package control

import (
	"bytes"
	"errors"
	"iter"
	"math"
	"strings"
	"testing"
	"time"
)

func TestPeople(t *testing.T) {
	for _, tc := range []struct {
		in   int64
		want string
	}{
		{0, "0"},
		{512, "512"},
		{1023, "1023"},
		{65536, "64KiB"},
		{1 << 40, "1TiB"},
		{1025, "1025"},
		{1234567, "1234567"},
		{12345678, "11.8MiB"},
		{1<<30 + 512, "1.0GiB"},
		{1<<40 - 1, "1.0TiB"},
		{math.MaxInt64, "8.0EiB"},
	} {
		if got := people(tc.in); got != tc.want {
			t.Errorf("people(%d)\n got %s\nwant %s", tc.in, got, tc.want)
		}
	}
}

func TestRate(t *testing.T) {
	for _, tc := range []struct {
		in   int64
		want string
	}{
		{1, "1 byte a second"},
		{341, "341 bytes a second"},
		{1024, "1KiB a second"},
		{302857, "295.8KiB a second"},
		{1 << 20, "1MiB a second"},
		{1067325, "1.0MiB a second"},
	} {
		if got := rate(tc.in); got != tc.want {
			t.Errorf("rate(%d)\n got %s\nwant %s", tc.in, got, tc.want)
		}
	}
}

// golden values, as a terminal and a script see them.
var (
	goldenChanges = ChangesInfo{65536, "449b2d0a-4d78-44d8-ab22-55a28bb7e11d", 12, 10, "", ""}
	goldenBegun   = ChangesInfo{65536, "449b2d0a-4d78-44d8-ab22-55a28bb7e11d", 12, 10, "the device is new", "it is not kept"}
	goldenDevice  = DeviceInfo{"vda", "/srv/vda.img", 10 << 30, "nbd+unix:///vda?socket=/s", "ok", 1, []string{"a", "b"}, goldenChanges, 90 * time.Second}
	goldenTaken   = SnapshotInfo{"nightly", time.Date(2026, 3, 4, 5, 6, 7, 89, time.UTC), "ok", true, 6 * time.Microsecond, 0, nil, []ImageInfo{
		{"vda", 10 << 30, "nbd+unix:///vda@nightly?socket=/s", "ok", 4096, goldenChanges, nil},
		{"long-name", 512, "nbd+unix:///long-name@nightly?socket=/s", "overflowed", 0, goldenChanges, nil},
	}, nil}
	goldenShares = int64(8192)
	goldenShown  = SnapshotInfo{"s", goldenTaken.Created, "ok", false, 0, 1 << 20, nil, []ImageInfo{
		{"vda", 512, "nbd:vda@s", "ok", 4096, goldenChanges, &goldenShares},
	}, &SpaceInfo{8 << 30, 1 << 30, 1 << 20, 1024 * time.Second}}
	goldenEvent = Event{7, time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC), "snapshot-created", "", "nightly", "2 devices"}
)

func once[T any](v T, err error) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		if yield(v, nil) && err != nil {
			var zero T
			yield(zero, err)
		}
	}
}

func TestOutput(t *testing.T) {
	utc := time.Local
	time.Local = time.UTC
	t.Cleanup(func() { time.Local = utc })
	const changesJSON = `{"block_size":65536,"generation":"449b2d0a-4d78-44d8-ab22-55a28bb7e11d","number":12,"base":10}`
	for _, tc := range []struct {
		name  string
		print func(Output) error
		text  string
		json  string
	}{
		{"devices", func(o Output) error { return o.Devices([]DeviceInfo{goldenDevice}) }, `
NAME  SIZE   STATE  SNAPSHOTS  CLIENTS  ORIGIN
vda   10GiB  ok     2          1        /srv/vda.img
`, `
{"name":"vda","origin":"/srv/vda.img","size":10737418240,"uri":"nbd+unix:///vda?socket=/s","state":"ok","clients":1,"snapshots":["a","b"],"cbt":` + changesJSON + `,"store_wait_ns":90000000000}
`},
		{"no devices", func(o Output) error { return o.Devices(nil) }, "\n", "\n"},
		{"device", func(o Output) error { return o.Device(goldenDevice) }, `
name            vda
origin          /srv/vda.img
size            10737418240 (10GiB)
uri             nbd+unix:///vda?socket=/s
state           ok
clients         1
snapshots       a, b
store_wait      1m30s
cbt/block_size  65536
cbt/generation  449b2d0a-4d78-44d8-ab22-55a28bb7e11d
cbt/number      12
cbt/base        10
`, `
{"name":"vda","origin":"/srv/vda.img","size":10737418240,"uri":"nbd+unix:///vda?socket=/s","state":"ok","clients":1,"snapshots":["a","b"],"cbt":` + changesJSON + `,"store_wait_ns":90000000000}
`},
		{"snapshots", func(o Output) error { return o.Snapshots([]SnapshotInfo{goldenTaken}) }, `
NAME     CREATED              STATE  ACCESS  HOLDS  DEVICES
nightly  2026-03-04 05:06:07  ok     rw      4KiB   vda,long-name
`, `
{"name":"nightly","created":"2026-03-04T05:06:07.000000089Z","state":"ok","writable":true,"held_up_ns":6000,"images":[{"device":"vda","size":10737418240,"uri":"nbd+unix:///vda@nightly?socket=/s","state":"ok","holds":4096,"cbt":` + changesJSON + `},{"device":"long-name","size":512,"uri":"nbd+unix:///long-name@nightly?socket=/s","state":"overflowed","holds":0,"cbt":` + changesJSON + `}]}
`},
		{"snapshot", func(o Output) error {
			return o.Snapshot(goldenShown)
		}, `
name       s
created    2026-03-04T05:06:07.000000089Z
state      ok
access     ro
held_up    0s
holds      4096 (4KiB)
shares     8192 (8KiB)
max_store  1048576 (1MiB)
expires    never
store      1GiB of 8GiB free, full in 17m4s at the present rate, 1MiB a second

DEVICE  SIZE  STATE  HOLDS  SHARES  NUMBER  URI
vda     512   ok     4KiB   8KiB    12      nbd:vda@s
`, `
{"name":"s","created":"2026-03-04T05:06:07.000000089Z","state":"ok","writable":false,"held_up_ns":0,"max_store":1048576,"images":[{"device":"vda","size":512,"uri":"nbd:vda@s","state":"ok","holds":4096,"cbt":` + changesJSON + `,"shares":8192}],"store":{"size":8589934592,"free":1073741824,"rate":1048576,"left_ns":1024000000000}}
`},
		{"changes", func(o Output) error { return o.Changes(goldenChanges) }, `
block_size  65536
generation  449b2d0a-4d78-44d8-ab22-55a28bb7e11d
number      12
base        10
`, "\n" + changesJSON + "\n"},
		{"changes of a known beginning", func(o Output) error { return o.Changes(goldenBegun) }, `
block_size  65536
generation  449b2d0a-4d78-44d8-ab22-55a28bb7e11d
number      12
base        10
reason      the device is new
warning     it is not kept
`, "\n" + strings.TrimSuffix(changesJSON, "}") + `,"reason":"the device is new","warning":"it is not kept"}` + "\n"},
		{"store", func(o Output) error { return o.Store([]PartInfo{{"mem", 1 << 30, 4096, 1<<30 - 4096, "ok"}}) }, `
PART  SIZE  USED  FREE    STATE
mem   1GiB  4KiB  1.0GiB  ok
`, `
{"part":"mem","size":1073741824,"used":4096,"free":1073737728,"state":"ok"}
`},
		{"extents", func(o Output) error { return o.Extents(once(Extent{4096, 8192, "zero"}, nil)) }, `
4096 8192 zero
`, `
{"offset":4096,"length":8192,"kind":"zero"}
`},
		{"events", func(o Output) error { return o.Events(once(goldenEvent, nil)) }, `
2026-03-04 05:06:07  snapshot-created  nightly  2 devices
`, `
{"seq":7,"time":"2026-03-04T05:06:07Z","kind":"snapshot-created","snapshot":"nightly","text":"2 devices"}
`},
		{"device added", func(o Output) error { return o.Added(goldenDevice) }, "\nvda  10737418240  nbd+unix:///vda?socket=/s\n", ""},
		{"snapshot taken", func(o Output) error { return o.Taken(goldenTaken) }, "\nnightly\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, form := range []struct {
				json bool
				want string
			}{{false, tc.text}, {true, tc.json}} {
				if form.want == "" {
					continue
				}
				var b bytes.Buffer
				err := tc.print(Output{&b, form.json})
				if want := strings.TrimPrefix(form.want, "\n"); b.String() != want || err != nil {
					t.Errorf("JSON: %v, error: %v\n got:\n%s\nwant:\n%s", form.json, err, b.String(), want)
				}
			}
		})
	}
}

// TestOutputOfBrokenStream prints what came before the error, and returns it.
func TestOutputOfBrokenStream(t *testing.T) {
	broken := errors.New("broken")
	var b bytes.Buffer
	err := Output{Writer: &b}.Extents(once(Extent{0, 512, "data"}, broken))
	if b.String() != "0 512 data\n" || !errors.Is(err, broken) {
		t.Errorf("broken stream\n got %q, %v\nwant the first line and %v", b.String(), err, broken)
	}
}
