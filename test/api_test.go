// The control socket, as programs other than blksnap use it.

package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"
)

// apiError is an answer of the daemon that is an error.
type apiError struct {
	Kind string `json:"kind"`
	Text string `json:"text"`
}

func (r *apiError) Error() string { return r.Text }

// deviceFacts, snapshotFacts and partFacts are what the tests read in answers.
type deviceFacts struct {
	Name  string `json:"name"`
	Size  int64  `json:"size"`
	State string `json:"state"`
	CBT   cbtFacts
}

func (f deviceFacts) isRollingBack() bool { return strings.Contains(f.State, "rolling back") }

type cbtFacts struct {
	Generation string `json:"generation"`
	Number     uint64 `json:"number"`
	Base       uint64 `json:"base"`
}

type snapshotFacts struct {
	Name     string       `json:"name"`
	Created  time.Time    `json:"created"`
	State    string       `json:"state"`
	Writable bool         `json:"writable"`
	MaxStore int64        `json:"max_store"`
	Expires  *time.Time   `json:"expires"`
	Images   []imageFacts `json:"images"`
}

type imageFacts struct {
	Device string `json:"device"`
	Size   int64  `json:"size"`
	State  string `json:"state"`
	Holds  int64  `json:"holds"`
	CBT    cbtFacts
}

type partFacts struct {
	Part  string `json:"part"`
	Size  int64  `json:"size"`
	Used  int64  `json:"used"`
	Free  int64  `json:"free"`
	State string `json:"state"`
}

// call sends a request to the daemon, with in as JSON unless it is nil, and reads
// the answer into out unless that is nil. The error is a *apiError where the daemon
// has answered with one.
func (d *daemon) call(method, path string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	q, err := http.NewRequest(method, "http://blksnap"+path, &body)
	if err != nil {
		return err
	}
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(d.runDir, "control.sock"))
		},
	}}
	r, err := client.Do(q)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		var e struct{ Error *apiError }
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil || e.Error == nil {
			return fmt.Errorf("%s %s: %s", method, path, r.Status)
		}
		return e.Error
	}
	if out == nil {
		out = new(any)
	}
	return json.NewDecoder(r.Body).Decode(out)
}
