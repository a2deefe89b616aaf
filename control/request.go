// How the client's requests travel: over the control socket, with what can go
// wrong on the way said in a line.

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
