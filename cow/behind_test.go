package cow

import (
	"strings"
	"testing"
)

// stamped is an origin whose change time the test sets.
type stamped struct {
	originFile
	changed *int64
}

func (f stamped) identify(bool) (identity, error) {
	size, err := f.size()
	return identity{ino: 1, size: size, changed: *f.changed}, err
}

// TestStampAfterAnEnd has somebody else's write stamp an origin while its device is
// closed. After a clean end our own last stamp is known, so any other is somebody else's,
// also where the clock was set back meanwhile. After a kill it is at least known what the
// stamp was when the last snapshot was taken.
func TestStampAfterAnEnd(t *testing.T) {
	const begun, taken, left = 1000, 1500, 2000
	for _, tc := range []struct {
		name   string
		stamp  int64
		killed bool
		why    string
	}{
		{"no write", left, false, ""},
		{"later", left + 1, false, "written or changed behind our back"},
		{"earlier, by a clock that was set back", left - 1, false, "restored to an earlier state"},
		{"from before our start", begun - 1, false, "restored to an earlier state"},
		{"killed, within the lease", left, true, ""},
		{"killed, from after the last snapshot", taken, true, ""}, // what came then is marked
		{"killed, from before the last snapshot", taken - 1, true, "restored to an earlier state"},
		{"killed, from before our start", begun - 1, true, "restored to an earlier state"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHome(t, siteSize)
			changed := int64(begun)
			h.wrap = func(f originFile) originFile { return stamped{f, &changed} }
			h.open()
			changed = taken
			h.take("s")
			put(t, h.dev, 1, 0, chunkSize)
			was := h.dev.Changes().Generation()
			changed = left
			next := h
			if tc.killed { // what that leaves
				next = &home{t: t, dir: t.TempDir(), size: h.size, wrap: h.wrap}
				copyTree(t, h.dir, next.dir)
			}
			h.close()
			changed, h = tc.stamp, next
			snaps := h.open()
			defer h.close()
			kept, state := h.dev.Changes().Generation() == was, image(t, snaps["s"], "vda").State()
			if tc.why == "" && (!kept || state != "ok") {
				t.Errorf("nobody wrote: the generation is kept: %v, the image is %s", kept, state)
			}
			if tc.why != "" && (kept || !strings.Contains(state, tc.why) || !strings.Contains(h.dev.Reason(), tc.why)) {
				t.Errorf("the generation is kept: %v, because %q; the image is %s\nwant a new one, a failed image, and %s", kept, h.dev.Reason(), state, tc.why)
			}
		})
	}
}
